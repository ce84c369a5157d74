import pytest
import torch

from sparsekit.system import ActivationStore, disk_errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0, 3 * 4 * 5 * 4, 10**9])
def test_the_same_bits_come_back_whatever_the_budget(dtype, budget, tmp_path):
    chunks = [torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)]
    store = ActivationStore(budget, tmp_path / "new")
    for chunk in chunks:
        store.append(chunk)
    assert store.resident <= budget
    assert all(torch.equal(a, b) for a, b in zip(store, chunks, strict=True))
    for index, chunk in enumerate(store):  # replaced while being read, as the walk does
        store[index] = chunk * 2
    assert store.resident <= budget
    assert all(torch.equal(a, b * 2) for a, b in zip(store, chunks, strict=True))
    files = list((tmp_path / "new").rglob("*.bin")) if (tmp_path / "new").exists() else []
    assert len(files) == sum(1 for chunk in store._chunks if not isinstance(chunk, torch.Tensor))
    assert bool(files) == (budget < 10**9)
    store.close()
    assert len(store) == 0 and not list(tmp_path.rglob("*.bin"))


def test_an_unwritable_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    store = ActivationStore(0, tmp_path / "file")
    with pytest.raises(OSError):
        store.append(torch.zeros(3))


def test_a_full_disk_is_an_os_error_whoever_reports_it(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, disk_errors(tmp_path):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library does
    assert caught.value.errno == 28
    with pytest.raises(Exception, match="another reason"), disk_errors(tmp_path):
        raise Exception("another reason")
