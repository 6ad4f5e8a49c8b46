"""What is said of a folder before anything is read or written."""

import pytest

from hybrid.errors import ArtifactError, ModelError
from hybrid.formats.folder import require_model, require_writable


def test_a_model_is_a_folder_or_a_gguf_file(tmp_path):
    require_model(tmp_path)
    (tmp_path / "file").write_bytes(b"GGML")
    (tmp_path / "model").write_bytes(b"GGUF")
    (tmp_path / "empty.gguf").touch()
    require_model(tmp_path / "model")
    require_model(tmp_path / "empty.gguf")
    for name, problem in (("file", "is neither a folder nor a GGUF file"), ("nowhere", "does not exist")):
        with pytest.raises(ModelError, match=f"model {tmp_path / name} {problem}; give a Hugging Face"):
            require_model(tmp_path / name)


def test_what_is_to_be_made_needs_a_folder_that_can_be_written(tmp_path, monkeypatch):
    require_writable(tmp_path)
    require_writable(tmp_path / "new" / "newer")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=f"cannot write {tmp_path / 'file' / 'new'}; choose another folder"):
        require_writable(tmp_path / "file" / "new")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ArtifactError, match="cannot write new; choose"):
        require_writable(tmp_path.__class__("new"))
