from .allocation import SAMPLE_LENGTH as SAMPLE_LENGTH
from .context import Context as Context
from .fitting import evaluate_path as evaluate_path
from .fitting import fit as fit
from .plan import BATCH_TOKENS as BATCH_TOKENS
from .plan import Plan as Plan
from .plan import make_plan as make_plan
from .sequence import run_stages as run_stages
