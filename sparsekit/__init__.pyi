from .maths import NM as NM
from .maths import Pattern as Pattern
from .maths import Stats as Stats
from .maths import Unstructured as Unstructured
from .maths import chain as chain
from .maths import parse as parse
from .model import Block as Block
from .model import discover as discover
from .model import load as load
from .system import ActivationStore as ActivationStore

__version__: str
