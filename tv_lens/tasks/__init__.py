"""Tasks, the rules that accept answers, the files they are read from, and the library."""

from tv_lens.tasks.contrast import ContrastivePairs, contrastive_library
from tv_lens.tasks.library import library
from tv_lens.tasks.readers import Located, Number, Object, Table, Tree, reader
from tv_lens.tasks.rules import Accepts, Rule, exact_match, starts_with
from tv_lens.tasks.task import Task, fingerprint

__all__ = [
    "Accepts",
    "ContrastivePairs",
    "Located",
    "Number",
    "Object",
    "Rule",
    "Table",
    "Task",
    "Tree",
    "contrastive_library",
    "exact_match",
    "fingerprint",
    "library",
    "reader",
    "starts_with",
]
