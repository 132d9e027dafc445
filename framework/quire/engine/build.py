"""Puts an engine together from a configuration: each plugin is constructed here and nowhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.config import Configured, EngineConfig, configure, core_sections, with_defaults
from quire.config_sections import check_sections
from quire.contract.attention import AttentionBackend, AttentionInit, is_float8
from quire.contract.executor import Executor, ExecutorInit
from quire.contract.kv import KVAllocator, KVInit
from quire.contract.metrics import MetricsInit, StepStats
from quire.contract.model import CausalLM, LayerFactory, ModelInit
from quire.contract.ops import OpInit
from quire.contract.quant import QuantInit, QuantMethod
from quire.contract.sampling import SamplerInit
from quire.contract.scheduling import PolicyInit, Scheduler, SchedulerInit
from quire.engine.chat import ChatFormat
from quire.engine.engine import Engine, EngineParts
from quire.engine.intake import Intake, IntakeLimits
from quire.engine.memory import num_kv_blocks
from quire.engine.metrics import Metrics
from quire.errors import ConfigError
from quire.layers.factory import Operations, PluginLayers
from quire.loader.checkpoint import resolve_checkpoint
from quire.loader.load import load_model
from quire.loader.progress import Progress, TerminalProgress
from quire.parsers.auto import select_parser
from quire.registry import HostOptions, PluginHost, Selection, build_host
from quire.resolve import ResolvedConfig, resolve
from quire.sampling.pipeline import SamplingPipeline, validate_params
from quire.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def build_engine(
    model: str | None,
    options: Mapping[str, Any],
    *,
    host: PluginHost | None = None,
    config: EngineConfig | None = None,
) -> Engine:
    """An engine ready to step, from a model and options, or from a complete configuration.

    Raises:
        ConfigError: it cannot run; the message says why and what to do.
    """
    configured = configured_by(model, options, config)
    return engine_from(configured, host or host_for(configured.config))


def configured_by(model: str | None, options: Mapping[str, Any], config: EngineConfig | None) -> Configured:
    """The configuration of a model and options, or a complete one. Raises ConfigError."""
    if config is not None and (model is not None or options):
        raise ConfigError("give either a complete config or a model with options, not both")
    if config is None:
        return configure(dict(options) | ({"model": model} if model is not None else {}))
    return Configured(config, dict.fromkeys(config.model_fields_set, "argument"))


def host_for(config: EngineConfig) -> PluginHost:
    """The installed plugins that the configuration lets in."""
    allowed = None if config.allowed_plugins is None else frozenset(config.allowed_plugins)
    return build_host(HostOptions(blocked=frozenset(config.blocked_plugins), allowed=allowed))


@dataclass(frozen=True, slots=True)
class Front:
    """What meets a request before the engine does: it needs the checkpoint's texts, not its weights."""

    config: ResolvedConfig
    tokenizer: Tokenizer
    intake: Intake
    chat: ChatFormat


def build_front(configured: Configured, host: PluginHost) -> Front:
    """Decide the configuration and read the tokenizer. Raises ConfigError."""
    check_sections(configured.sections, host.config_sections(), core_sections())
    configured = with_defaults(configured, host.config_defaults(configured.config.model_dump()), host.complain)
    checkpoint = resolve_checkpoint(configured.config.model, configured.config.revision)
    config = resolve(configured, host, checkpoint)
    tokenizer = build_tokenizer(config)
    intake = Intake(tokenizer, _limits(config, tokenizer), time.monotonic)
    return Front(config, tokenizer, intake, _chat_format(config, host, tokenizer))


def engine_from(configured: Configured, host: PluginHost) -> Engine:
    """An engine in this process, from a configuration and loaded plugins. Raises ConfigError."""
    if configured.config.process:
        raise ConfigError(
            "engine.process is set; only a server's engine runs in a process of its own",
            remedy="leave engine.process out, or use `quire serve` or AsyncLLM",
        )
    front = build_front(configured, host)
    executor = _construct(front.config, host, "executor", lambda options: ExecutorInit(front.config, host, options))
    executor.start()
    budget = executor.kv_budget()
    blocks = num_kv_blocks(front.config, budget)
    executor.allocate_kv(blocks)
    engine = Engine(_parts(front, host, executor, blocks))
    host.notify("quire_on_engine_start", engine=engine.info())
    return engine


def build_tokenizer(config: ResolvedConfig) -> Tokenizer:
    """The checkpoint's tokenizer, with the user's chat template if there is one."""
    path = config.config.chat_template
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"chat_template is {path!r}, which is no file", remedy="name a Jinja file")
    template = Path(path).read_text(encoding="utf-8") if path is not None else None
    timeout = config.config.chat_template_timeout
    return Tokenizer(config.checkpoint.folder, config.checkpoint.generation_config, template, timeout)


def build_layers(config: ResolvedConfig, host: PluginHost) -> PluginLayers:
    """Where the model's layers get their operations and quantized forms from."""
    device = config.device.torch_device()
    op_sets = [
        (
            choice.name,
            choice.make(OpInit(device, config.max_num_batched_tokens, _options(config, host, choice))),
        )
        for choice in config.op_sets
    ]
    operations = Operations(op_sets, config.ops)
    return PluginLayers(operations, _quantization(config, host, operations))


def build_model(
    config: ResolvedConfig, host: PluginHost, progress: Progress | None = None, layers: PluginLayers | None = None
) -> CausalLM:
    """Load the model onto the device."""
    layers = layers or build_layers(config, host)
    model = load_model(config.checkpoint, config.spec, model_init(config, layers), progress or TerminalProgress())
    for kind, name in layers.unused_overrides().items():
        logger.warning("%s is named for %s, but the model has no such operation", name, kind)
    return model


def model_init(config: ResolvedConfig, layers: LayerFactory) -> ModelInit:
    """All that the model is built from."""
    return ModelInit(
        config=config.model_config,
        device=config.device.torch_device(),
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        layers=layers,
        deterministic=config.config.deterministic,
        checkpoint=str(config.checkpoint.folder),
        stored_rows=config.checkpoint.stored_rows,
    )


def build_attention(config: ResolvedConfig, host: PluginHost, model: CausalLM) -> AttentionBackend:
    """The chosen attention backend, for the model's layers."""
    choice = config.selected["attention"]
    init = AttentionInit(
        device=config.device.torch_device(),
        dtype=config.dtype,
        layers=model.attention_layers,
        block_size=config.block_size,
        max_num_reqs=config.max_num_seqs,
        max_num_tokens=config.max_num_batched_tokens,
        max_blocks_per_req=-(-config.max_model_len // config.block_size),
        deterministic=config.config.deterministic,
        options=_options(config, host, choice),
        kv_dtype=config.config.kv_cache_dtype,
    )
    backend: AttentionBackend = choice.make(init)
    if any(layer.k_scale != 1.0 or layer.v_scale != 1.0 for layer in init.layers) and not is_float8(init.cache_dtype):
        logger.info("the checkpoint's KV cache scales are not used; they are for kv_cache_dtype fp8_e4m3")
    somewhere = torch.zeros(1, 1, dtype=torch.int64)
    if any(backend.sees(layer, somewhere, somewhere[0]) is not None for layer in init.layers):
        logger.warning("attention %r leaves out keys on purpose: results are not the model's", choice.name)
    return backend


def build_pipeline(config: ResolvedConfig, host: PluginHost, vocab_size: int) -> SamplingPipeline:
    """The sampler and the logits processors."""

    def init(choice: Selection) -> SamplerInit:
        device = config.device.torch_device()
        return SamplerInit(device, vocab_size, config.max_num_seqs, _options(config, host, choice))

    sampler = config.selected["sampler"]
    processors = [(choice.provider.name, choice.make(init(choice))) for choice in config.processors]
    return SamplingPipeline(sampler.make(init(sampler)), processors, init(sampler))


def _parts(front: Front, host: PluginHost, executor: Executor, blocks: int) -> EngineParts:
    config, clock = front.config, time.monotonic
    allocator: KVAllocator = _construct(
        config,
        host,
        "kv_allocator",
        lambda options: KVInit(blocks, config.block_size, config.config.enable_prefix_caching, options),
    )
    policy = _construct(config, host, "scheduler_policy", PolicyInit)
    scheduler: Scheduler = _construct(
        config,
        host,
        "scheduler",
        lambda options: SchedulerInit(
            allocator=allocator,
            policy=policy,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            clock=clock,
            options=options,
            needs_host_tokens=lambda params: any(
                choice.target.needs_host_tokens(params) for choice in config.processors
            ),
        ),
    )
    sinks = [
        (choice.provider.name, choice.make(MetricsInit(config.checkpoint.name, _options(config, host, choice))))
        for choice in config.sinks
    ]
    return EngineParts(
        config=config,
        executor=executor,
        allocator=allocator,
        scheduler=scheduler,
        tokenizer=front.tokenizer,
        intake=front.intake,
        metrics=Metrics(sinks, clock),
        chat=front.chat,
        on_step=_step_hook(host),
        num_kv_blocks=blocks,
        blame=host.blame,
    )


def _chat_format(config: ResolvedConfig, host: PluginHost, tokenizer: Tokenizer) -> ChatFormat:
    choice = select_parser(host, config.config.output_parser, tokenizer.chat_template)
    return ChatFormat(tokenizer, choice.target, _options(config, host, choice))


def _limits(config: ResolvedConfig, tokenizer: Tokenizer) -> IntakeLimits:
    vocab_size = config.spec.vocab_size(config.model_config)
    processors = [choice.target for choice in config.processors]
    return IntakeLimits(
        max_model_len=config.max_model_len,
        vocab_size=vocab_size,
        seed=config.config.seed,
        stop_token_ids=tokenizer.stop_token_ids,
        validate=lambda params: validate_params(params, vocab_size, processors),
    )


def _step_hook(host: PluginHost) -> Callable[[StepStats], None] | None:
    """None if nobody listens, so that a step pays nothing for the hook."""
    if not host.has_hook("quire_on_step"):
        return None
    return lambda stats: host.notify("quire_on_step", stats=stats)


def _quantization(config: ResolvedConfig, host: PluginHost, operations: Operations) -> QuantMethod | None:
    choice = config.quantization
    if choice is None:
        return None
    stored = {name: (tensor.shape, tensor.dtype) for name, tensor in config.checkpoint.tensors.items()}
    method: QuantMethod = choice.make(
        QuantInit(
            config=config.checkpoint.quantization_config,
            stored=stored,
            device=config.device.torch_device(),
            dtype=config.dtype,
            options=_options(config, host, choice),
            op=operations.op,
        )
    )
    return method


def _construct(config: ResolvedConfig, host: PluginHost, point: str, init: Callable[[Any], Any]) -> Any:
    choice = config.selected[point]
    return choice.make(init(_options(config, host, choice)))


def _options(config: ResolvedConfig, host: PluginHost, choice: Selection) -> Any:
    return host.options_for(choice.provider, config.config.plugin_options)
