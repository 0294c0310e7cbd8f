"""What the language model reads: files, their parts, batches, windows."""

import numpy as np
import text


def test_standard_library_is_split_by_file_and_always_alike():
  files = text.standard_library()
  assert len(files) > 300
  assert files == text.standard_library()
  assert not any('site-packages' in path.parts for path in files)
  first, second = text.load(None), text.load(None)
  assert str(first) == str(second)
  assert len(first.train) > 10 * len(first.validation) > 1_000_000


def test_split_is_disjoint_and_complete():
  files = [bytes([65 + i]) * (i + 1) for i in range(45)]
  train, validation = (part.split(b'\n') for part in text.split(files))
  assert not set(train) & set(validation)
  assert sorted(train + validation) == sorted(files)
  assert len(validation) == 2


def test_few_files_are_cut_at_the_end():
  assert text.split([b'0123456789']) == (b'012345678', b'9')


def test_folder_is_read_sorted_without_hidden_and_binary_files(tmp_path):
  (tmp_path / '.git').mkdir()
  (tmp_path / '.git/config').write_text('hidden')
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub/b.txt').write_text('second')
  (tmp_path / 'a.txt').write_text('first')
  (tmp_path / 'image').write_bytes(b'\x89PNG\0')
  loaded = text.load(tmp_path)
  joined = loaded.train.tobytes() + loaded.validation.tobytes()
  assert joined == b'first\nsecond'


def test_batches_follow_from_seed_and_step(data):
  batches = text.training_batches(data, 16, 4, seed=1)
  assert batches[5].shape == (4, 17)
  assert batches[5].dtype == np.uint8
  again = text.training_batches(data, 16, 4, seed=1)
  np.testing.assert_array_equal(batches[5], again[5])
  other = text.training_batches(data, 16, 4, seed=2)
  assert (batches[5] != other[5]).any()


def test_windows_predict_each_byte_once(data):
  windows = text.Windows(data.train, 16)
  predicted = np.concatenate([windows[i][1:] for i in range(len(windows))])
  np.testing.assert_array_equal(predicted, data.train[1 : len(predicted) + 1])
