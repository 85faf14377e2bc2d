"""Checkpoints of a training run: saved while it trains, restored only when they verify.

Orbax writes and restores the arrays. It neither detects bit rot nor goes back to an older step, so
each step also has a document: the config, a fingerprint of the training data, the state of every
host's data iterator, and the checksum of every leaf (document.py, checksums.py).

    workdir/checkpoints/1200/state   arrays, under their "/"-joined paths
    workdir/checkpoints/1200/run     the document
    workdir/checkpoints/1400.bad     a damaged step, renamed when step 1200 was restored instead
"""

import contextlib
import fnmatch
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util

from sana_jax.runtime.errors import DoNotRetry, Retry, UserError
from sana_jax.runtime.files import (
    UNREACHABLE,
    absolute,
    check_is_folder,
    is_full,
    is_local,
    reason_of,
    storage,
)
from sana_jax.runtime.hosts import (
    gather_values,
    is_loss,
    log_first_host,
    on_first_host,
    raise_together,
)
from sana_jax.runtime.lock import locked
from sana_jax.training.checkpoints.arrays import (
    Damaged,
    check_saved,
    damage,
    flatten,
    read_arrays,
    unwrapped,
    wrapped,
)
from sana_jax.training.checkpoints.barriers import Barriers, OtherHostFailed, make_manager
from sana_jax.training.checkpoints.checksums import checksums
from sana_jax.training.checkpoints.document import (
    ABSENT,
    FREE,
    Document,
    brief,
    decode,
    encode,
    keys,
    sha256,
    show,
    some,
)
from sana_jax.training.checkpoints.orbax_repairs import repair

repair()

State = TypeVar("State")

PATTERNS = "[]\\"
SAVE_ATTEMPTS = 3  # this many failures in a row end the run

_TEMPORARY, _FINISHED = ".orbax-checkpoint-tmp", "commit_success.txt"  # Orbax's names


class Checkpoints:
    """The checkpoints of a folder; a context in which no other run writes there.

    Raises UserError if another run does. (An object store has no locks, mounted or not.) All
    methods but `steps` are collective. The first host alone lists the folder, since on shared
    storage other hosts may see a new file later.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        config: Document,
        data: Document,
        keep: int = 3,
        keep_every: int | None = None,
        free: Sequence[str] = FREE,
        defaults: Document | None = None,
    ):
        """
        Args:
          workdir: the folder of the run, made if missing; it may be remote.
          config: everything that decides the run, as JSON; a run of another config is refused.
          data: identifies the data set (files, sizes, hashes, seed); other data is refused too.
          keep: how many of the latest steps are kept.
          keep_every: steps that are multiples of it are kept for good.
          free: globs of keys of the config that may change, with dots between levels.
          defaults: a config whose values stand for keys that a run of before did not have yet.
        """
        check_name(workdir)
        self.workdir = epath.Path(workdir)
        self.folder = absolute(workdir) / "checkpoints"  # Orbax saves to absolute paths alone
        self._remote = not is_local(workdir)
        self._about = json.loads(json.dumps({"config": config, "data": data}))
        self._free = [f"config.{glob}" for glob in free]
        self._defaults = json.loads(json.dumps({"config": defaults or {}}))
        self._keep, self._keep_every = keep, keep_every
        self._manager: ocp.CheckpointManager | None = None
        self._stack, self._failures = contextlib.ExitStack(), 0
        self._barriers = Barriers()
        self._check_folder: Callable[[], None] = lambda: None
        self._saving: tuple[int, bool] | None = None
        self.last_good: int | None = None  # newest step saved outside a streak of NaN

    def __enter__(self) -> "Checkpoints":
        about = {key: x for key, x in keys(self._about).items() if not self._may_change(key)}
        first, *others = gather_values(sha256(about))
        if wrong := [host for host, found in enumerate(others, 1) if found != first]:
            raise UserError(
                f"hosts {some([str(host) for host in wrong])} have another config, or other data,"
                " than host 0: give all of them the same"
            )
        with contextlib.ExitStack() as stack:
            on_first_host(self._enter, stack)
            self._stack = stack.pop_all()
        return self

    def _enter(self, stack: contextlib.ExitStack) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._remote:
                self._check_folder = stack.enter_context(locked(self.workdir, "--workdir"))
            self._sweep()
        except UNREACHABLE as error:
            reason = f"--workdir={self.workdir}: {reason_of(error)}"
            if isinstance(error, OSError) and (is_full(error) or self.steps()):
                raise Retry(reason) from error  # a run that has begun may go on later
            raise UserError(reason) from None

    def __exit__(self, kind, error, trace) -> None:
        with self._stack:
            if is_loss(error):  # closing would wait for that host
                return
            try:
                if kind is None:  # after an error other hosts may not come here
                    self.wait()
            finally:
                self._close()

    def steps(self) -> list[int]:
        """Returns the steps in the folder, in order, whether they verify or not. Raises Retry."""
        check_is_folder(self.folder)
        with storage(self.folder):
            paths = self.folder.iterdir() if self.folder.exists() else ()
            return sorted(int(path.name) for path in paths if self._is_finished(path))

    def _is_finished(self, path: epath.Path) -> bool:
        """Returns True for a step whose save has ended: it was renamed or, if remote, marked."""
        is_step = path.name.isdecimal() and path.name == str(int(path.name))  # 007 is none
        return is_step and (not self._remote or (path / _FINISHED).exists())

    def restore(self, abstract: State, batches: Any = None) -> State | None:
        """Returns the newest state that verifies, or None where there is no checkpoint at all.

        Args:
          abstract: a tree of ShapeDtypeStructs with the shardings wanted now; the mesh may differ
            from that of the run which saved.
          batches: the data iterator of this host. Its `set_state` is given the saved state; where
            the number of hosts has changed, the result of `batches.share` on all hosts' states.

        Raises:
          UserError: the config, the data or the shapes are not those of the checkpoint.
          DoNotRetry: no checkpoint verifies.
          Retry: the storage does not answer.
        """
        wanted, treedef = flatten(abstract)
        bad: dict[int, str] = {}
        for step in reversed(on_first_host(self.steps)):
            try:
                document = on_first_host(self._document, step)
                raise_together(self._check, step, document, wanted)
                arrays = read_arrays(self.folder / str(step), document, wanted)
            except Damaged as error:
                bad[step] = str(error)
                continue
            on_first_host(self._set_aside, bad, step)
            if batches is not None:
                batches.set_state(self._position(step, document, batches))
            self.last_good = on_first_host(self._last_good, step, document)
            return jax.tree.unflatten(treedef, wrapped(arrays, wanted))
        if bad:
            reasons = ", ".join(f"{step} ({reason})" for step, reason in bad.items())
            raise DoNotRetry(
                f"none of the checkpoints in {self.folder} is whole: {reasons};"
                " bring one back, or start anew in another --workdir"
            )
        return None

    def save(self, step: int, state: Any, iterator: Any = None, good: bool = True) -> None:
        """Starts to save, after the last save has ended; returns when the arrays may change.

        Args:
          step: the state's step; a step that is in the folder is not saved again.
          state: a tree of arrays.
          iterator: the state of this host's data iterator after that step.
          good: whether the last update was applied.

        Raises:
          Retry: saving failed SAVE_ATTEMPTS times in a row; a single failure is logged. The folder
            is gone.
          UserError: the folder was renamed.
        """
        self.wait()
        on_first_host(self._check_folder)
        if step in on_first_host(self.steps):
            return
        flat, _ = flatten(state)
        arrays = {name: unwrapped(leaf) for name, leaf in flat.items()}
        sums = checksums(arrays)
        leaves = {n: [str(a.dtype), list(a.shape), sums[n]] for n, a in arrays.items()}
        document = {
            "step": step,
            "good": good,
            **self._about,
            "leaves": leaves,
            "iterators": gather_values(encode(iterator)),
        }
        document["sha256"] = sha256(document)
        self._saving = step, good
        self._barriers.begin()
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays), run=ocp.args.JsonSave(document)
        )
        self._forgive(lambda: self._open().save(step, args=args, force=True))

    def save_surely(self, step: int, state: Any, iterator: Any = None, good: bool = True) -> None:
        """Saves, and tries again until the step is on disk. Raises Retry as `save` does."""
        while step not in on_first_host(self.steps):
            self.save(step, state, iterator, good)
            self.wait()

    def wait(self) -> None:
        """Waits until the save that was started is on disk. Raises Retry as `save` does."""
        if self._saving is None:
            return
        step, good = self._saving

        def finish():
            if self._manager is not None:
                self._manager.wait_until_finished()
            if jax.process_index() == 0:
                self._look(step)

        if self._forgive(finish):
            self._saving, self._failures = None, 0
            self.last_good = step if good else self.last_good

    def _look(self, step: int) -> None:
        """Raises an error, and sets the step aside, unless it is there and can be read."""
        self._check_folder()
        if step not in self.steps():
            raise OSError("it is not there after it was saved")
        try:
            check_saved(self.folder / str(step), self._document(step))
        except Damaged:
            self._rename(step)
            raise

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._barriers.install()
            self._manager = make_manager(self.folder, self._keep, self._keep_every, self._barriers)
        return self._manager

    def _sweep(self) -> None:
        """Removes the remains of saves that were cut short."""
        for path in self.folder.iterdir() if jax.process_index() == 0 else ():
            is_number = self._remote and path.name.isdecimal()
            unfinished = is_number and not (path / _FINISHED).exists()
            if unfinished or _TEMPORARY in path.name:
                path.rmtree()

    def _close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # the error of a save that failed or was given up
                manager.close()

    def _forgive(self, action: Callable[[], Any]) -> bool:
        """Returns whether a part of a save succeeds on all hosts; raises Retry as `save` does.

        After a failure the manager is closed, since its memory cannot be trusted.
        """

        def tell():
            try:
                action()
            except Exception as error:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others may be gone
                    self._barriers.fail()
                if isinstance(error, OtherHostFailed) and error.__context__:
                    raise error.__context__ from None  # Orbax meets the others after its own errors
                raise

        try:
            raise_together(tell)
        except Exception as error:  # Orbax and TensorStore raise various errors for a full disk
            if isinstance(error, jax.errors.JaxRuntimeError) or is_loss(error):
                raise
            step, _ = self._saving
            self._saving, self._failures = None, self._failures + 1
            self._close()
            on_first_host(self._check_folder)  # or the saves of another run would be swept
            with contextlib.suppress(OSError):
                self._sweep()
            reason = f"step {step} could not be saved to {self.folder}: {brief(error)}"
            if self._failures >= SAVE_ATTEMPTS:
                newest = max(self.steps(), default="none")
                raise Retry(f"{reason}; the newest checkpoint is {newest}") from error
            logging.error("%s", reason)
            return False
        return True

    def _document(self, step: int) -> Document:
        with damage("its document"):
            document = json.loads((self.folder / str(step) / "run" / "metadata").read_text())
            if document.pop("sha256") != sha256(document):
                raise ValueError("a wrong hash")
        return document

    def _check(self, step: int, document: Document, wanted: dict[str, Any]) -> None:
        """Raises UserError if the checkpoint belongs to another run."""
        then = keys({name: document[name] for name in ("config", "data")})
        now, defaults = keys(self._about), keys(self._defaults)
        then |= {key: defaults[key] for key in now if key in defaults and key not in then}
        changed = [key for key in now | then if now.get(key, ABSENT) != then.get(key, ABSENT)]
        changed = [key for key in changed if not self._may_change(key)]
        if changed:
            lines = [f"{k}: {show(then, k)} -> {show(now, k)}" for k in changed]
            raise UserError(
                f"--workdir={self.workdir} is of another run: {some(lines)};"
                " use another folder, or what is before the arrows (free to change are"
                f" {', '.join(glob.removeprefix('config.') for glob in self._free)})"
            )
        then = {name: f"{dtype}{shape}" for name, (dtype, shape, _) in document["leaves"].items()}
        raw = {name: jax.eval_shape(unwrapped, leaf) for name, leaf in wanted.items()}
        now = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in raw.items()}
        changed = [n for n in now | then if now.get(n) != then.get(n)]
        if changed:
            lines = [f"{n}: {show(then, n)} -> {show(now, n)}" for n in changed]
            raise UserError(
                f"{self.folder / str(step)} is of another model: {some(lines)};"
                " use another --workdir"
            )

    def _may_change(self, key: str) -> bool:
        return any(fnmatch.fnmatch(key, glob) for glob in self._free)

    def _position(self, step: int, document: Document, batches: Any) -> Any:
        """Returns the state of this host's data iterator."""
        states, hosts = [decode(state) for state in document["iterators"]], jax.process_count()
        if len(states) == hosts:
            return states[jax.process_index()]
        if not hasattr(batches, "share"):
            raise UserError(
                f"{self.folder / str(step)} was saved by {len(states)} hosts, whose data does not"
                f" split over {hosts}; use as many as then"
            )
        return batches.share(states)

    def _set_aside(self, bad: dict[int, str], step: int) -> None:
        """Renames the damaged steps, now that the older `step` has verified."""
        for damaged, reason in bad.items():
            line = f"checkpoint {damaged} is damaged ({reason}); going back to step {step}"
            logging.error("%s", line)
            log_first_host(line)
            with storage(self.folder / str(damaged)):
                self._rename(damaged)

    def _rename(self, step: int) -> None:
        """Renames a damaged step, which would be taken for one that is saved."""
        number, path = 0, self.folder / f"{step}.bad"
        while path.exists():
            number += 1
            path = self.folder / f"{step}.bad{number}"
        (self.folder / str(step)).rename(path)

    def _last_good(self, step: int, document: Document) -> int | None:
        for older in reversed([s for s in self.steps() if s <= step]):
            with contextlib.suppress(Damaged):
                if (document if older == step else self._document(older))["good"]:
                    return older
        return None


def check_name(workdir: str | epath.Path) -> None:
    """Raises UserError for a folder whose checkpoints Orbax 0.12 could not save or read back."""
    # It looks for arrays by a pattern, in which the folder's own brackets and backslashes count.
    if wrong := sorted(set(PATTERNS) & set(str(absolute(workdir)))):
        raise UserError(
            f"{workdir}: checkpoints below a folder with {' and '.join(wrong)} in its"
            " name could not be read back; rename it, or name another"
        )


def read_newest(workdir: str | epath.Path, part: str) -> tuple[Document, Any]:
    """Returns the document and one part of the state of the newest good checkpoint that verifies.

    Changes nothing in the folder, where a run may be going on.

    Args:
      workdir: the folder of the run.
      part: a field of the state, which is returned as nested dicts of arrays.

    Raises:
      UserError: there is no checkpoint, or none that is whole and good.
      Retry: the storage does not answer.
    """
    checkpoints, bad = Checkpoints(workdir, {}, {}), []
    for step in reversed(on_first_host(checkpoints.steps)):
        try:
            document = on_first_host(checkpoints._document, step)
            if not document["good"]:
                raise Damaged("its last update was not finite")
            leaves = {n: x for n, x in document["leaves"].items() if n.startswith(f"{part}/")}
            wanted = {n: np.empty(shape, dtype) for n, (dtype, shape, _) in leaves.items()}
            arrays = read_arrays(checkpoints.folder / str(step), document, wanted)
        except Damaged as error:
            bad.append(f"{step} ({error})")
            continue
        if bad:
            logging.warning("checkpoints left out: %s; step %d is used", ", ".join(bad), step)
        flat = {name.removeprefix(f"{part}/"): array for name, array in arrays.items()}
        return document, traverse_util.unflatten_dict(flat, sep="/")
    found = f"none of {', '.join(bad)} can be used" if bad else "there are none"
    raise UserError(f"{checkpoints.folder}: {found}; name the --workdir of a training")
