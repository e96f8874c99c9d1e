"""`noisebench fit | validate | test | predict`: LightningCLI with `base:` recipes, run folders, records and a guard."""

import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from callbacks.epoch_sums import EpochSums
from callbacks.nonfinite import StopOnNonFiniteLoss
from callbacks.requeue import Requeue
from callbacks.rng import RngState
from callbacks.run_record import RunRecord
from scripts import provenance, recipes
from scripts.checkpoints import (
    FileInPlaceOfFolder,
    LastCheckpoint,
    differences,
    own_checkpoint,
    read_checkpoint_facts,
    refuse_folder,
)
from scripts.code_hash import code_hash
from scripts.errors import UserError
from scripts.mirror import wandb_logger
from scripts.options import (
    HOUSEKEEPING,
    PRINTING,
    overrides,
    plain_message,
    settings,
    split_config_options,
    without_options,
)
from scripts.run_folder import claim_folder, has_finished, lock_run

# `--trainer.limit_train_batches 1` is one batch, 1.0 all of them. `typing` keeps one object for both orders of
# Optional[Union[int, float]]: without this, the order of other imports would decide which type is tried first.
for _name, _hint in L.Trainer.__init__.__annotations__.items():
    if _hint == int | float | None:
        L.Trainer.__init__.__annotations__[_name] = int | float | None


class RecipeCLI(LightningCLI):
    """LightningCLI that owns the run's folder.

    Args:
        recipe: file of the recipe, for the record.
        verb: fit, validate, test or predict.
        argv: arguments after the verb, without `--config`.
        more_configs: further config files, for the record.
        extra_callbacks: added to the Trainer (progress of `reproduce`).
        resume: `fit` only: as its option `--resume true`.
    """

    def __init__(
        self,
        recipe: Path | None,
        verb: str,
        argv: list[str],
        more_configs: list[str],
        extra_callbacks: tuple[Callback, ...] = (),
        resume: bool = False,
    ) -> None:
        self.recipe = recipe
        self.verb = verb
        self.command_line = argv
        self.overrides = [f"--config {name}" for name in more_configs] + overrides(argv)
        self.more_configs = more_configs
        self.extra_callbacks = extra_callbacks
        self.resume = resume
        self.lock: IO[str] | None = None
        documents = [] if recipe is None else recipes.expand(recipe)
        for name in more_configs:
            documents += recipes.expand(recipes.find_recipe(name))
        options = [word for document in documents for word in ("--config", yaml.safe_dump(document, sort_keys=False))]
        with warnings.catch_warnings():
            # we pass `args` on purpose: recipes are already unfolded there
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            # Lightning calls what torch and jsonargparse have renamed
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*deprecated")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.")
            # our epoch values are sums over the ranks already
            warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\(.*sync_dist")
            if verb != "fit":
                # nor does a checkpoint's evaluation need the callbacks that recorded its training
                warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
            try:
                self._start([verb, *options, *argv])
            finally:
                if self.lock is not None:
                    self.lock.close()

    def _start(self, args: list[str]) -> None:
        strict = {"exit_on_error": False, "allow_abbrev": False}
        example = "example: noisebench {} --config elr/mini-sym40 {}--trainer.accelerator cpu"
        verbs = {name: {**strict, "epilog": example.format(name, "--ckpt_path FILE ")} for name in self.subcommands()}
        verbs["fit"]["epilog"] = example.format("fit", "--model.lam 5 ")
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,
            parser_kwargs={**strict, **verbs},
            trainer_defaults={
                "logger": False,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # our loaders split the global batch themselves
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods that the command offers."""
        common = {"model", "dataloaders", "datamodule"}
        fit = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {"fit": fit, "validate": common, "test": common, "predict": common}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `checkpoint.*` and the options of the run folder."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_on_train_epoch_end": True, "checkpoint.enable_version_counter": False})
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--overwrite", type=bool, default=False, help="true deletes this run's earlier results")
        parser.add_argument(
            "--resume",
            type=bool,
            default=False,
            help="true continues the newest checkpoint of this run's own folder if the same code wrote it; else starts "
            "anew and keeps what was there as <folder>.oldN",
        )
        parser.add_argument(
            "--fallback", type=bool, default=False, help="with --resume: true passes over an unreadable checkpoint"
        )
        parser.add_argument(
            "--wandb", type=bool, default=True, help="mirror to Weights & Biases; offline when not logged in"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As LightningCLI; mistakes become one message."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            if self.recipe is None:
                raise UserError("--config is missing; name a recipe, e.g. --config elr/mini-sym40") from error
            raise UserError(plain_message(str(error))) from error
        if self.verb != "fit" and self._option("ckpt_path") is None:
            raise UserError(f"--ckpt_path is missing; {self.verb} needs the checkpoint of a trained net")

    def _parse_ckpt_path(self) -> None:
        """Keeps the options as given (plain Lightning lets the checkpoint's win) and stops if they differ."""
        path = self._option("ckpt_path")
        if path is None or path in ("last", "best", "hpc", "registry"):
            return
        if not Path(path).exists():
            raise UserError(f"--ckpt_path: no checkpoint {path}")
        stored = read_checkpoint_facts(Path(path))
        if not stored:
            return
        parts = ("model", "data") if self.verb == "fit" else ("model",)
        differing = differences(stored.get("config", {}), self._plain_config(), parts)
        if differing:
            raise UserError(
                f"--ckpt_path {path} was written with other settings: {'; '.join(differing)}. "
                "Give the same settings, or start without --ckpt_path"
            )

    def before_instantiate_classes(self) -> None:
        """Chooses the run's folder from what will be computed."""
        self.plain = self._plain_config()
        self.seed = int(self._option("seed_everything"))
        self.config_hash = recipes.short_hash(settings(self.plain))
        self.code_hash = code_hash(settings(self.plain))
        name = "local/config" if self.recipe is None else recipes.recipe_name(self.recipe)
        self.folder = Path(self._option("runs")) / name / self.config_hash / f"seed{self.seed}"
        config = self.config[self.verb]
        if self.verb != "fit":
            return
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(self.folder / "checkpoints")
        config.trainer.default_root_dir = str(self.folder)
        self.ckpt_path = self._option("ckpt_path")
        self.resume = self.resume or self._option("resume")
        if self.resume and (self.ckpt_path or self._option("overwrite")):
            raise UserError("--resume continues the run's own folder; give it without --ckpt_path and --overwrite")
        if self._option("fallback") and not self.resume:
            raise UserError("--fallback chooses among the checkpoints that --resume true may continue; give both")
        self._claim_folder()
        config.ckpt_path = self.ckpt_path

    def _claim_folder(self) -> None:
        """Rank 0 locks the folder and decides between a new run and a resume."""
        writes = getattr(rank_zero_only, "rank", 0) in (None, 0)
        if writes:
            self.lock = lock_run(self.folder)
        if self.resume:
            # every rank finds the same one
            self.ckpt_path = own_checkpoint(self.folder / "checkpoints", self.code_hash, self._option("fallback"))
        if writes:
            claim_folder(self.folder, self.ckpt_path, self.resume, self._option("overwrite"))

    def _run_subcommand(self, subcommand: str) -> None:
        """As LightningCLI; a finished run is left alone, for its record names the commit that trained it."""
        # from an earlier checkpoint, in the place of a broken last one, it has steps to do
        at_end = self.resume and self.ckpt_path and Path(self.ckpt_path).name == "last.ckpt"
        if subcommand != "fit" or not (at_end and has_finished(self.folder)):
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the callbacks that every run has, and the W&B mirror."""
        facts = self._facts()
        if self.verb == "fit" and self._option("wandb") and not self.plain["trainer"]["logger"]:
            kwargs["logger"] = wandb_logger(self.folder, f"{facts['recipe']} seed {self.seed}", self.ckpt_path)
            facts["wandb_id"] = kwargs["logger"].version
        if SLURMEnvironment.detect():
            given = self._get(self.config_init, "trainer").get("plugins") or []
            # its own requeue writes the checkpoint within the signal's handler; callbacks.requeue waits for the step
            own = SLURMEnvironment(auto_requeue=False)
            kwargs["plugins"] = [*(given if isinstance(given, list) else [given]), own]
        trainer: Any = super().instantiate_trainer(**kwargs)
        refuse_folder(self._option("ckpt_path"), trainer.strategy)
        trainer.strategy.checkpoint_io = FileInPlaceOfFolder()
        others = [c for c in trainer.callbacks if not isinstance(c, ModelCheckpoint)]
        if self.verb != "fit":
            trainer.callbacks = others
        else:
            savers = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
            checkpoints = self.folder / "checkpoints"
            always = [RngState(), EpochSums(), StopOnNonFiniteLoss(), Requeue(checkpoints)]
            always.append(RunRecord(self.folder, facts))
            last = LastCheckpoint(checkpoints)
            trainer.callbacks = [*others, *self.extra_callbacks, *always, *savers, last]
        return trainer

    def _facts(self) -> dict[str, Any]:
        recipe = "local/config" if self.recipe is None else recipes.recipe_name(self.recipe)
        hardware = dict(provenance.hardware())
        if torch.cuda.is_available():
            hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        names = ([] if self.recipe is None else [_shown(self.recipe)]) + self.more_configs
        unneeded = {*HOUSEKEEPING, *(f"trainer.{name}" for name in PRINTING)}
        words = without_options(self.command_line, lambda name: name in unneeded)
        command = ["noisebench", self.verb, *(w for n in names for w in ("--config", n)), *words]
        return {
            "command": shlex.join(command),
            "recipe": recipe,
            "recipe_hash": None if self.recipe is None else recipes.recipe_hash(self.recipe),
            "overrides": self.overrides,
            "config": {key: value for key, value in self.plain.items() if key not in HOUSEKEEPING},
            "config_hash": self.config_hash,
            "code_hash": self.code_hash,
            "git": provenance.git_state(),
            "versions": provenance.versions(),
            "hardware": {**hardware, "torch_threads": torch.get_num_threads()},
            "seed": self.seed,
        }

    def _option(self, name: str) -> Any:
        return self.config[self.verb].get(name)

    def _plain_config(self) -> dict[str, Any]:
        """The resolved config as plain mappings, as YAML would hold it."""
        config: Namespace = self.config[self.verb].clone()
        config.pop("config", None)
        return yaml.safe_load(self._parser(self.verb).dump(config, skip_unset=False, skip_validation=True))


def run(verb: str, argv: list[str], extra_callbacks: tuple[Callback, ...] = (), resume: bool = False) -> RecipeCLI:
    """Parses, builds and runs one recipe in this process; arguments as on the command line after the verb."""
    names, rest = split_config_options(argv)
    recipe = recipes.find_recipe(names[0]) if names else None
    return RecipeCLI(recipe, verb, rest, names[1:], extra_callbacks, resume)


def verb(name: str, argv: list[str]) -> int:
    """Entry of `noisebench fit ...` and its siblings."""
    cli = explained(lambda: run(name, argv), " ".join(split_config_options(argv)[0]))
    if name == "fit" and cli.trainer.is_global_zero:
        print(f"run finished: {cli.folder}")
    return 0


def explained(action: Callable[[], Any], recipe: str) -> Any:
    """Runs `action`; what a user can mend becomes a UserError that names the recipe."""
    try:
        return action()
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("NOISEBENCH_TRACEBACK"):
            raise
        hint = f"(recipe {recipe}; NOISEBENCH_TRACEBACK=1 shows where)" if recipe else ""
        if "by peer" in str(error):
            # gloo speaks of its sockets only
            raise UserError(f"another process of this run has ended; --resume true continues {hint}".strip()) from error
        raise UserError(f"{plain_message(str(error))} {hint}".strip()) from error


def _shown(recipe: Path) -> str:
    """The recipe as a user anywhere can name it."""
    resolved = recipe.resolve()
    return f"recipes/{resolved.relative_to(recipes.ROOT)}" if resolved.is_relative_to(recipes.ROOT) else str(recipe)
