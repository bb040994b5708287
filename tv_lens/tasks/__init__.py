"""Tasks, the rules that accept answers, the files they are read from, and the library."""

from tv_lens.tasks.library import library
from tv_lens.tasks.rules import Accepts, exact_match, rule_name, starts_with
from tv_lens.tasks.task import Task, fingerprint

__all__ = ["Accepts", "Task", "exact_match", "fingerprint", "library", "rule_name", "starts_with"]
