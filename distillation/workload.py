"""What a run is trained on and how often, and how often that runs the parts of both models."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """What is trained on, and how often.

    Args:
        positions: Tokens of one pass over the data, the part whose states are kept at a time.
        batches: Batches of one pass, a smaller last one by its share.
        batch_size: Windows per batch.
        seq_len: Tokens per window.
        epochs_per_block: Passes per student block.
        head_epochs: Passes of the head phase; None if it does not run.
        polish_epochs: Passes of the whole student; 0 if it is not polished.
        layer_map: Entry m is the teacher block of student block m.
        schedule: As in the settings.
        freeze_previous: Whether earlier blocks stay fixed.
        levels_fit: Whether the states of all teaching blocks fit into memory together, which spares
            "parallel_local" the teacher from the second epoch on.
        reads_teacher: Whether the teacher's states enter blocks that learn.
        reads_student: Whether the student's own do.
        passes: How many passes the data come in; every stage has all its epochs on each.
        polish_reads_levels: Whether the polish is taught the states of all teaching blocks too.
        trains_stitches: Whether there are stitches that learn.
        teacher_bytes: What the teacher takes where the run trains; None is all of it.
        held_out: Held-out tokens, for each of a pass: every stage takes its loss on them before its
            first epoch and after each.
    """

    positions: int
    batches: float
    batch_size: int
    seq_len: int
    epochs_per_block: Sequence[int]
    head_epochs: int | None
    polish_epochs: int
    layer_map: Sequence[int]
    schedule: str
    freeze_previous: bool = True
    levels_fit: bool = False
    reads_teacher: bool = False
    reads_student: bool = True
    passes: int = 1
    polish_reads_levels: bool = False
    trains_stitches: bool = True
    teacher_bytes: int | None = None
    held_out: float = 0.0

    def levels_at_once(self, teacher_blocks: int) -> int:
        """How many of the teacher's levels a stage wants side by side; 0 if none does.

        The blocks that learn together ask for those of their teachers, and so does a polish that is
        taught hidden states, which needs the last one besides.
        """
        if self.polish_epochs and self.polish_reads_levels:
            return len({*self.layer_map, teacher_blocks - 1})
        return len(set(self.layer_map)) if self.schedule == "parallel_local" else 0

    @property
    def learns_in_chain(self) -> bool:
        """Whether each block learns on what those before it, as they stay, make of the data."""
        in_turn = self.schedule == "sequential" and self.freeze_previous
        return in_turn and not self.reads_teacher and all(self.epochs_per_block)

    def over_passes(
        self, kept: "Passes", streamed: "Passes", fresh: "Passes"
    ) -> "tuple[Passes, Passes]":
        """What all passes take, with states kept and without.

        Args:
            kept: What a pass takes whose states are there from the stage before.
            streamed: What a pass takes without kept states.
            fresh: What a pass takes whose states are computed first, and then kept.
        """
        return kept.plus(fresh.times(self.passes - 1)), streamed.times(self.passes)


@dataclass(frozen=True)
class Passes:
    """How often per batch the parts of both models run in one stage."""

    teacher_blocks: int
    student_blocks: int
    steps: int

    def times(self, count: int) -> "Passes":
        """So many times as often."""
        return Passes(self.teacher_blocks * count, self.student_blocks * count, self.steps * count)

    def plus(self, other: "Passes") -> "Passes":
        """Both together."""
        return Passes(
            self.teacher_blocks + other.teacher_blocks,
            self.student_blocks + other.student_blocks,
            self.steps + other.steps,
        )
