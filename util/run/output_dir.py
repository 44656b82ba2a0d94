"""The output directory of a run, and its checkpoints, which may be elsewhere."""

import os
from pathlib import Path

from util.config import Config
from util.errors import UserError
from util.files import user_path, write_atomically


def last_checkpoint(config: Config) -> Path:
    """Return the path of the checkpoint that the run resumes from."""
    if not config.checkpoint:
        return user_path(config.output_dir) / "last.pth"
    return user_path(config.checkpoint if "/" in config.checkpoint else f"checkpoints/{config.checkpoint}")


def best_checkpoint(config: Config, last: Path) -> Path:
    """Return the path of the checkpoint with the best score; it is beside a --checkpoint that is a path, as
    in the published SimMatchV2.
    """
    named = "/" in config.checkpoint
    return last.with_stem(f"{last.stem}_best") if named else user_path(config.output_dir) / "best.pth"


def init_output_dir(
    output_dir: Path, checkpoint_dir: Path, best: Path, config_yaml: str, new_run: bool
) -> str:
    """Make both directories and write config.yaml into the first. Raises UserError if that is not possible.

    new_run: whether nothing is resumed; if so, log.jsonl, the file `best` and another config.yaml, of an
    earlier run or of the user, are renamed and not overwritten. Return a line that names them, or "".
    """
    archived = []
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        config_file = output_dir / "config.yaml"
        for path in (output_dir / "log.jsonl", best, config_file):
            same = path == config_file and path.is_file() and path.read_bytes() == config_yaml.encode()
            if new_run and path.exists() and path.stat().st_size and not same:
                names = (path.with_name(f"{path.name}.old{n}") for n in range(1, 10**6))
                archive = next(name for name in names if not name.exists())
                os.replace(path, archive)
                archived.append(archive.name)
        write_atomically(config_file, lambda file: file.write(config_yaml.encode()))
    except OSError as error:
        raise cannot_write(output_dir, error) from None
    return f"an earlier run's files in {output_dir} were renamed: {', '.join(archived)}" if archived else ""


def cannot_write(output_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to output directory {output_dir}: {error.strerror}; choose another with --output-dir"
    )
