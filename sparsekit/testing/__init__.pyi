from .contexts import context as context
from .solver import PATTERNS as PATTERNS
from .solver import check_solver as check_solver
