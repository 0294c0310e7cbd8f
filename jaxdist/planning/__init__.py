"""What a step will cost on links that one does not have, and what to send."""

from jaxdist.planning.advise import Advice as Advice
from jaxdist.planning.advise import Prediction as Prediction
from jaxdist.planning.advise import advise as advise
from jaxdist.planning.advise import break_even as break_even
from jaxdist.planning.candidates import CANDIDATES as CANDIDATES
from jaxdist.planning.candidates import Candidate as Candidate
from jaxdist.planning.cost import StepTime as StepTime
from jaxdist.planning.cost import step_time as step_time
from jaxdist.planning.lgreco import level_errors as level_errors
from jaxdist.planning.lgreco import lgreco as lgreco
from jaxdist.planning.links import LINKS as LINKS
from jaxdist.planning.links import Link as Link
