from .contexts import begin as begin
from .contexts import context as context
from .contexts import tiny_model as tiny_model
from .contexts import tiny_tokens as tiny_tokens
from .criterion import check_criterion as check_criterion
from .solver import PATTERNS as PATTERNS
from .solver import check_solver as check_solver
