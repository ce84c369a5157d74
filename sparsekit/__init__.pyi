from .maths import NM as NM
from .maths import Pattern as Pattern
from .maths import Stats as Stats
from .maths import Unstructured as Unstructured
from .maths import chain as chain
from .maths import parse as parse
from .model import Block as Block
from .model import discover as discover
from .model import load as load
from .results import masks as masks
from .results import verify as verify
from .run import evaluate as evaluate
from .run import export_run as export_run
from .run import fit as fit
from .run import fit_each as fit_each
from .run import prune as prune
from .system import ActivationStore as ActivationStore
from .train import HoldZeros as HoldZeros
from .train import mask_adapters as mask_adapters

__version__: str
