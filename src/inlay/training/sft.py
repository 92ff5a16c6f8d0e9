"""One run of supervised fine-tuning: data in, adapter, record and report out. The training loop is TRL's, through Inlay's peft alias."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any

from . import adapters, data, masking, models
from .errors import InputError
from .events import Listener
from .masking import Encoder
from .settings import RunSettings

CHECKPOINTS = "checkpoints"
RECORD = "run.json"
METRICS = "metrics.jsonl"
REPORT = "report.html"
KEPT_CHECKPOINTS = 2  # the best and the latest
VALIDATION_ROWS_SCORED = 500  # for the comparison in the report; the validation loss during training sees all rows
PACKAGES = ("inlay", "torch", "transformers", "trl", "accelerate", "datasets", "safetensors")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run left behind; ``record`` is the content of run.json."""

    folder: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    interrupted: bool


def is_main_process() -> bool:
    """Whether this is the process that prints and writes, under ``accelerate launch`` or torchrun."""
    return os.environ.get("RANK", "0") == "0"


def train(settings: RunSettings, listener: Listener | None = None, command: Sequence[str] = ()) -> RunResult:
    """Train an adapter as the settings say.

    Args:
        listener: hears notes, steps and validations; only in the main process.
        command: the words of the command, for the record.

    Raises:
        InputError: data, model, adapter config or output folder cannot be used. Nothing has been written then.
        FloatingPointError: the loss became NaN or infinite.
    """
    listener = listener or Listener()
    if settings.data is None:
        raise InputError("DATA: no training data given; for example `inlay train rows.jsonl --model MODEL`.")
    folder = settings.output_folder()
    if is_main_process():
        _check_folder(folder, settings)
    models.locate(settings.model)  # what is mistyped is said before anything heavy is imported
    rows = data.read(settings.data)
    training, validation = (
        (rows.samples, data.read(settings.val, "--val").samples)
        if settings.val
        else data.split(rows.samples, settings.val_fraction, settings.seed)
    )
    config = adapters.build_config(settings.method, _schedule(settings, len(training)) | settings.adapter | _seed(settings))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run to the hub otherwise
    adapters.serve_peft()

    tokenizer = models.load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code)
    template = masking.apply_template_choice(tokenizer, settings.chat_template)
    encoder = Encoder(tokenizer, settings.train_on)
    max_length = min(settings.max_length, models.context_length(settings.model, settings.trust_remote_code))
    train_set = encoder.encode_all(training, max_length)
    val_set = encoder.encode_all(validation, max_length)
    if not train_set.rows:
        raise InputError(
            f"DATA {settings.data}: no answer token is left within {max_length} tokens; raise --max-length or cut the prompts."
        )
    # Rows without an answer are gone now, so the steps are known.
    if schedule := _schedule(settings, len(train_set.rows)):
        config = dataclasses.replace(config, **schedule)
    facts = {
        "path": str(settings.data.resolve()),
        "sha256": rows.sha256,
        "schema": rows.schema,
        "chat_template": template,
        "max_length": max_length,
        "train": train_set.summary(),
        "validation": val_set.summary(),
    }
    listener.data_ready(facts | {"sample": rendered_sample(tokenizer, train_set.rows[0]), "kept_aside": settings.val is None})

    model = models.load_model(
        settings.model, settings.dtype, settings.device, settings.trust_remote_code, place=False, quantization=settings.quantization
    )
    started = time.perf_counter()
    record = {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "settings": json.loads(settings.model_copy(update=_absolute_paths(settings)).model_dump_json()),
        "data": facts,
        "versions": versions(),
    }
    trainer = _Run(settings, folder, model, tokenizer, config, train_set.rows, val_set.rows, listener)
    record["adapter_config"] = _plain(trainer.model.peft_config["default"].to_dict())
    record["parameters"] = adapters.parameter_counts(trainer.model) | {"groups": adapters.parameter_table(trainer.model)}
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, record)
    try:
        interrupted = trainer.run()
    except BaseException:
        if is_main_process():
            write_json(folder / RECORD, record | {"status": "failed"})
        raise

    trainer.save()
    metrics: list[dict[str, Any]] = []
    if is_main_process():
        from .callbacks import read_metrics

        metrics = read_metrics(folder / METRICS)
        record |= {
            "status": "interrupted" if interrupted else "finished",
            "device": str(trainer.device),
            "results": trainer.results(metrics) | {"seconds": round(time.perf_counter() - started, 1)},
        }
        write_json(folder / RECORD, record)
        comparison = None
        if val_set.rows and not interrupted:
            comparison = _compare(trainer.model, tokenizer, encoder, val_set, settings.samples, listener)
            record["comparison"] = comparison.as_dict()
            write_json(folder / RECORD, record)
        from .report import write_report

        write_report(folder / REPORT, record, metrics, comparison)
    return RunResult(folder, record, metrics, interrupted)


def _compare(model: Any, tokenizer: Any, encoder: Encoder, val_set: masking.EncodedSet, answers: int, listener: Listener) -> Any:
    from .evaluate import compare

    kept, rows = val_set.kept[:VALIDATION_ROWS_SCORED], val_set.rows[:VALIDATION_ROWS_SCORED]
    with listener.counting("comparing base and tuned", 2 * (len(rows) + min(answers, len(kept)))) as advance:
        return compare(model, tokenizer, kept, rows, encoder.stop_tokens(rows), answers, advance=advance)


class _Run:
    """The trainer with everything hung on it."""

    def __init__(
        self,
        settings: RunSettings,
        folder: Path,
        model: Any,
        tokenizer: Any,
        config: Any,
        train_rows: list[masking.Encoded],
        val_rows: list[masking.Encoded],
        listener: Listener,
    ) -> None:
        from transformers import EarlyStoppingCallback, PrinterCallback
        from trl.trainer.sft_trainer import SFTTrainer

        from .callbacks import RunRecorder, StopOnInterrupt, StopOnNonFinite

        self.settings, self.folder = settings, folder
        self.stop, self.non_finite = StopOnInterrupt(listener), StopOnNonFinite()
        callbacks: list[Any] = [self.stop, self.non_finite]
        if is_main_process():
            callbacks.insert(0, RunRecorder(folder / METRICS, listener))
        if settings.patience:
            if not val_rows:
                raise InputError("--patience: there are no validation rows to be patient about; give --val or a larger --val-fraction.")
            callbacks.append(EarlyStoppingCallback(settings.patience))
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise InputError(f"--model {settings.model}: some weights are missing from its files.")

        class Trainer(SFTTrainer):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
                """TRL makes the loss of logits by itself; what a method adds comes on top, and a method's own loss in its place."""
                if adapters.has_own_loss(self.accelerator.unwrap_model(model)):
                    outputs = model(**inputs)
                    return (outputs.loss, outputs) if return_outputs else outputs.loss
                loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
                extra = adapters.added_to_loss(self.accelerator.unwrap_model(model)) if model.training else 0.0
                return (loss[0] + extra, *loss[1:]) if return_outputs else loss + extra

            def create_model_card(self, *args: Any, **kwargs: Any) -> None:
                """Saving the adapter writes its card; one for the folder of checkpoints helps nobody."""

        arguments = _arguments(settings, folder, model, bool(val_rows))
        try:
            self.trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=_dataset(train_rows),
                eval_dataset=_dataset(val_rows) if val_rows else None,
                processing_class=tokenizer,
                peft_config=config,
                callbacks=callbacks,
            )
        except ValueError as error:  # the adapter does not fit the model: nothing matches, or a layer that cannot be adapted
            raise InputError(f"{settings.method} on {settings.model}: {' '.join(str(error).split())}") from error
        self.trainer.remove_callback(PrinterCallback)
        self.model: Any = self.trainer.model
        adapters.take_over_loss(self.model)

    @property
    def device(self) -> Any:
        return self.trainer.args.device

    def run(self) -> bool:
        """Train; True when it was interrupted.

        Raises:
            FloatingPointError: the loss became NaN or infinite.
        """
        with self.stop:
            try:
                self.trainer.train(resume_from_checkpoint=self.settings.resume or None)
            except KeyboardInterrupt:
                if not self.stop.asked:
                    raise
        if self.non_finite.step is not None:
            raise FloatingPointError(
                f"the loss or its gradient is no number at step {self.non_finite.step}; lower --lr, or use --dtype float32 or bfloat16."
            )
        return self.stop.asked

    def save(self) -> None:
        """Write adapter and tokenizer into the run's folder; all processes take part, and go their own ways afterwards."""
        from accelerate import PartialState

        self.trainer.save_model(str(self.folder))  # gathers what is sharded
        if is_main_process():
            (self.folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of what run.json says in words
        PartialState().destroy_process_group()

    def results(self, metrics: list[dict[str, Any]]) -> dict[str, Any]:
        """The figures of the run in a few numbers."""
        steps = [line for line in metrics if "loss" in line]
        validations = [line for line in metrics if "val_loss" in line]
        best = min(validations, key=lambda line: line["val_loss"], default=None)
        last = steps[-1] if steps else {}
        return {
            "steps": self.trainer.state.global_step,
            "train_loss": last.get("loss"),
            "val_loss": best and best["val_loss"],
            "best_step": best and best["step"],
            "tokens": last.get("tokens"),
            "tokens_per_second": last.get("tokens_per_second"),
            "training_seconds": last.get("seconds"),
        }


def _arguments(settings: RunSettings, folder: Path, model: Any, validate: bool) -> Any:
    import torch
    from trl.trainer.sft_config import SFTConfig

    device = models.choose_device(settings.device)
    when = "steps" if settings.eval_every else "epoch"
    return SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        gradient_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=model.dtype is torch.bfloat16,
        fp16=model.dtype is torch.float16,
        use_cpu=device == "cpu",
        eval_strategy=when if validate else "no",
        save_strategy=when,
        eval_steps=settings.eval_every,
        save_steps=settings.eval_every or 500,
        save_total_limit=KEPT_CHECKPOINTS,
        load_best_model_at_end=validate,
        metric_for_best_model="eval_loss" if validate else None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is no number behind an average
        dataset_kwargs={"skip_prepare_dataset": True},  # tokens and labels are ours, and verified
        max_length=None,
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        report_to="none",
    )


def _dataset(rows: list[masking.Encoded]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def _seed(settings: RunSettings) -> dict[str, int]:
    """The run's seed for an adapter config that has one of its own."""
    return {"seed": settings.seed} if "seed" in adapters.config_fields(settings.method) else {}


def _schedule(settings: RunSettings, rows: int) -> dict[str, int]:
    """The optimizer steps of the run, for an adapter config that plans with them and has not been told."""
    if "total_step" in settings.adapter or "total_step" not in adapters.config_fields(settings.method):
        return {}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    an_epoch = ceil(ceil(rows / (settings.batch_size * processes)) / settings.grad_accum)
    return {"total_step": settings.max_steps or ceil(settings.epochs * an_epoch)}


def _absolute_paths(settings: RunSettings) -> dict[str, Path]:
    """So that the run can be resumed from another working directory."""
    return {name: path.resolve() for name, path in (("data", settings.data), ("val", settings.val)) if path is not None}


def _check_folder(folder: Path, settings: RunSettings) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: there is a file of that name; choose another folder.")
    checkpoints = sorted((folder / CHECKPOINTS).glob("checkpoint-*"))
    if settings.resume:
        if not checkpoints:
            raise InputError(f"--resume: no checkpoint in {folder / CHECKPOINTS}; leave --resume out to start anew.")
        _check_same_data(folder, settings)
    elif checkpoints or (folder / RECORD).exists() or (folder / adapters.ADAPTER_CONFIG).exists():
        if not settings.overwrite:
            raise InputError(
                f"--output {folder}: holds a run already. Add --resume to go on with it, --overwrite to replace it, or name another folder."
            )
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        (folder / METRICS).unlink(missing_ok=True)


def _check_same_data(folder: Path, settings: RunSettings) -> None:
    """Resuming skips the rows already seen, which only makes sense on the same rows."""
    import hashlib

    try:
        before = json.loads((folder / RECORD).read_text(encoding="utf-8"))["data"]["sha256"]
    except (OSError, ValueError, KeyError):
        return
    if settings.data is not None and settings.data.is_file() and hashlib.sha256(settings.data.read_bytes()).hexdigest() != before:
        raise InputError(f"--resume: {settings.data} has changed since the run began; start a new run, or bring the old data back.")


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings of an earlier run in this folder, to go on with.

    Raises:
        InputError: no run there.
    """
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"--resume: no {RECORD} of a run in {folder}; name its folder with --output.") from None


def rendered_sample(tokenizer: Any, row: masking.Encoded) -> list[tuple[str, bool]]:
    """The sample as text in stretches: [(text, whether it is trained on), ...]."""
    stretches: list[tuple[list[int], bool]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        trained = label != masking.IGNORED
        if not stretches or stretches[-1][1] != trained:
            stretches.append(([], trained))
        stretches[-1][0].append(token)
    return [(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), trained) for ids, trained in stretches]


def versions() -> dict[str, str]:
    """Python and the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one go, so that a reader never sees half of it."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def _plain(value: Any) -> Any:
    """Sets and enums as JSON has them."""
    if isinstance(value, dict):
        return {str(getattr(key, "value", key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    return getattr(value, "value", value)
