# What __init__.py imports when it is first used, for type checkers; tests/test_types.py compares them.
from . import policies as policies
from .audits.audit import Audit as Audit
from .audits.retention import audit as audit
from .display.explore import explore as explore
from .errors import BudgetError as BudgetError
from .errors import CudaError as CudaError
from .errors import DeviceError as DeviceError
from .errors import NotInterceptedError as NotInterceptedError
from .errors import UnsupportedModelError as UnsupportedModelError
from .eviction import ops as ops
from .eviction import reference as reference
from .eviction.allocation import Allocation as Allocation
from .eviction.fairness import Fair as Fair
from .eviction.selection import Kept as Kept
from .eviction.selection import keep as keep
from .experiments.effects import effects as effects
from .hf.cache import KeptCache as KeptCache
from .hf.report import Report as Report
from .hf.save import load_cache as load_cache
from .hf.wrap import Handle as Handle
from .hf.wrap import unwrap as unwrap
from .hf.wrap import wrap as wrap
from .policies import Policy as Policy
from .policies.adakv import AdaKV as AdaKV
from .policies.chunkkv import ChunkKV as ChunkKV
from .policies.h2o import H2O as H2O
from .policies.keydiff import KeyDiff as KeyDiff
from .policies.knorm import KNorm as KNorm
from .policies.lagkv import LagKV as LagKV
from .policies.pyramidkv import PyramidKV as PyramidKV
from .policies.snapkv import SnapKV as SnapKV
from .policies.streaming_llm import StreamingLLM as StreamingLLM
from .policies.tova import TOVA as TOVA
from .prompts.prompt import Prompt as Prompt
from .prompts.prompt import Span as Span

__version__: str
