from .compared import write_comparison as write_comparison
from .html import add_to_report as add_to_report
from .html import require_finished as require_finished
from .html import write_page as write_page
