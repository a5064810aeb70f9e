"""The order of work of a save and of a load. Import what it offers from here."""

from shardpoint.engine.background import BackgroundSaver
from shardpoint.engine.carried import stored_run
from shardpoint.engine.colossal import is_colossal_layout, native_source, open_colossal
from shardpoint.engine.colossal_check import check_fit
from shardpoint.engine.foreign import load_foreign, save_foreign, verify_share
from shardpoint.engine.inspection import Checkpoint, ReadResult, TensorInfo, open_checkpoint
from shardpoint.engine.lazy import Arrival, load_weights_first
from shardpoint.engine.load import Target, load
from shardpoint.engine.opening import ReplicaCheck, SaveRequest
from shardpoint.engine.parts import (
    load_lr_scheduler,
    load_model,
    load_optimizer,
    save_adapter_directory,
    save_lr_scheduler,
    save_model_directory,
    save_model_file,
    save_optimizer_directory,
    save_optimizer_file,
)
from shardpoint.engine.pending import PendingSave
from shardpoint.engine.plans import PlanCache, SavePlan
from shardpoint.engine.recording import RunJournal
from shardpoint.engine.results import LoadResult, SaveResult
from shardpoint.engine.resuming import resume_named, tell_of_suspects
from shardpoint.engine.save import BUDGET_BYTES, SaveAttempt, save
from shardpoint.engine.schedule import Schedule
from shardpoint.engine.source import Source, open_committed, source_of
from shardpoint.engine.structure import StructureCache
from shardpoint.engine.training import (
    checkpoint_name,
    is_foreign,
    refused_request,
    run_state,
    running_states,
    training_request,
    training_target,
)

__all__ = [
    "BUDGET_BYTES",
    "Arrival",
    "BackgroundSaver",
    "Checkpoint",
    "LoadResult",
    "PendingSave",
    "PlanCache",
    "ReadResult",
    "ReplicaCheck",
    "RunJournal",
    "SaveAttempt",
    "SavePlan",
    "SaveRequest",
    "SaveResult",
    "Schedule",
    "Source",
    "StructureCache",
    "Target",
    "TensorInfo",
    "check_fit",
    "checkpoint_name",
    "is_colossal_layout",
    "is_foreign",
    "load",
    "load_foreign",
    "load_lr_scheduler",
    "load_model",
    "load_optimizer",
    "load_weights_first",
    "native_source",
    "open_checkpoint",
    "open_colossal",
    "open_committed",
    "refused_request",
    "resume_named",
    "run_state",
    "running_states",
    "save",
    "save_adapter_directory",
    "save_foreign",
    "save_lr_scheduler",
    "save_model_directory",
    "save_model_file",
    "save_optimizer_directory",
    "save_optimizer_file",
    "source_of",
    "stored_run",
    "tell_of_suspects",
    "training_request",
    "training_target",
    "verify_share",
]
