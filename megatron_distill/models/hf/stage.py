"""One rank's part of a model: filled from a model folder, gathered back from all ranks.

`parameters` are always this rank's by Megatron name with layers numbered through the whole model, as `parameters_of`
gives them; so neither pipeline stages nor their interleaving are seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_distill.errors import ModelError
from megatron_distill.models.hf.io import SafetensorsFolder, TensorPlan
from megatron_distill.models.hf.mapping import Rule, rules
from megatron_distill.models.spec import ModelSpec


def parameters_of(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """All parameters of the GPTModels that this rank holds: one, or several with an interleaved pipeline.

    Wrappers' `module.` is taken off the names, and layers are renumbered from the chunk's count to the model's.
    """
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        layers = {f"decoder.layers.{n}.": layer.layer_number - 1 for n, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            prefix = next((prefix for prefix in layers if name.startswith(prefix)), None)
            rest = name if prefix is None else f"decoder.layers.{layers[prefix]}.{name.removeprefix(prefix)}"
            found[rest] = parameter
    return found


def uses_te_names(parameters: Mapping[str, Tensor]) -> bool:
    """Whether the model was built with Transformer Engine's layer spec."""
    return any(name.endswith(".layer_norm_weight") for name in parameters)


def load_stage(
    parameters: Mapping[str, Tensor],
    spec: ModelSpec,
    reader: SafetensorsFolder,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Fill this rank's parameters in place, reading only its slices and holding one parameter's worth at a time.

    Args:
        parameters: converted to each parameter's own type.
        spec: the architecture.
        reader: the model folder.
        tp_rank: tensor-parallel rank.
        tp_size: tensor-parallel ranks.

    Raises:
        ModelError: the folder lacks a tensor, has one that the model has no place for, or one of another shape;
            or the model does not divide over `tp_size`.
    """
    check_names(spec, reader)
    table = {rule.name: rule for rule in rules(spec, uses_te_names(parameters))}
    layers = {rule.layer for name in parameters if (rule := table.get(name)) and rule.layer is not None}
    expected = {name for name, rule in table.items() if rule.layer in layers or name in parameters}
    assert expected == set(parameters), f"the built model and the table differ: {sorted(expected ^ set(parameters))}"
    with torch.no_grad():
        for name, parameter in parameters.items():
            _fill(parameter, table[name], reader, tp_rank, tp_size)


def _fill(parameter: Tensor, rule: Rule, reader: SafetensorsFolder, tp_rank: int, tp_size: int) -> None:
    rows = parameter.shape[0] if rule.vocabulary else None
    parts = []
    for index, (name, shape) in enumerate(zip(rule.hf, rule.shapes, strict=True)):
        _check_shape(name, shape, reader)
        if rule.dim is None:
            parts.append(reader.read(name))
        else:
            start, stop = rule.extent(index, tp_rank, tp_size, rows)
            parts.append(reader.read(name, rule.dim, start, stop))
    shard = rule.merge(parts)
    real = shard.shape[0] if rule.vocabulary else parameter.shape[0]
    assert parameter[:real].shape == shard.shape, (rule.name, parameter.shape, shard.shape)
    parameter[:real].copy_(shard)
    parameter[real:].zero_()


def check_folder(spec: ModelSpec, reader: SafetensorsFolder) -> None:
    """Hold the folder's names and shapes against the architecture's; reads headers, not weights.

    Raises:
        ModelError: a tensor is missing, has no place, or has another shape.
    """
    check_names(spec, reader)
    for rule in rules(spec):
        for name, shape in zip(rule.hf, rule.shapes, strict=True):
            _check_shape(name, shape, reader)


def _check_shape(name: str, shape: tuple[int, ...], reader: SafetensorsFolder) -> None:
    if (found := reader.shape(name)) != shape:
        raise ModelError(f"{reader.file(name)}: {name} is {found}, the config says {shape}; files do not match")


def check_names(spec: ModelSpec, reader: SafetensorsFolder) -> None:
    """Hold the folder's names against the architecture's.

    Raises:
        ModelError: a tensor is missing, or there is one that the architecture has no place for.
    """
    wanted = {name for rule in rules(spec) for name in rule.hf}
    # Old folders store frequencies, which follow from the config.
    surplus = {name for name in reader.names - wanted if not name.endswith(".rotary_emb.inv_freq")}
    if spec.tied_embeddings and "lm_head.weight" in surplus:
        _check_tied(spec, reader)
        surplus.discard("lm_head.weight")
    if missing := sorted(wanted - reader.names):
        raise ModelError(
            f"{reader.path}: {len(missing)} tensors missing, first {missing[0]}; complete the download, "
            "or correct config.json"
        )
    if surplus:
        first = min(surplus)
        raise ModelError(
            f"{reader.file(first)}: {len(surplus)} tensors have no place in a {spec.family} model of "
            f"{spec.num_layers} layers, first {first}; config.json and weights do not belong together"
        )


def _check_tied(spec: ModelSpec, reader: SafetensorsFolder, rows: int = 8192) -> None:
    """A stored head beside tied embeddings must equal them: transformers would untie them otherwise."""
    for start in range(0, spec.vocab_size, rows):
        stop = min(start + rows, spec.vocab_size)
        head, embedding = (
            reader.read(name, 0, start, stop) for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        if not torch.equal(head, embedding):
            raise ModelError(
                f"{reader.file('lm_head.weight')}: lm_head.weight differs from the embedding, but config.json says "
                "tie_word_embeddings; set it to false there if the head is trained"
            )


def gather_over(
    parameters: Mapping[str, Tensor], *, tp_group: ProcessGroup | None = None, pp_group: ProcessGroup | None = None
) -> Callable[[Rule], Sequence[Tensor]]:
    """The `shards` of `mapping.export` where ranks hold parts: every rank gets every tensor.

    Collective over both groups, when called and whenever its result is. The pipeline stage that owns a parameter
    gathers it over its tensor-parallel ranks; then the shards go to the other stages.

    Args:
        parameters: this rank's.
        tp_group: tensor-parallel group; None when alone.
        pp_group: pipeline group; None when alone.
    """
    tp_size = 1 if tp_group is None else tp_group.size()
    device = next(iter(parameters.values())).device
    held = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()}
    stages = [held]
    if pp_group is not None and pp_group.size() > 1:
        stages = [{} for _ in range(pp_group.size())]
        dist.all_gather_object(stages, held, group=pp_group)

    def shards(rule: Rule) -> Sequence[Tensor]:
        owner = next(stage for stage, names in enumerate(stages) if rule.name in names)
        count = 1 if rule.dim is None else tp_size
        if pp_group is None or pp_group.rank() == owner:
            found = _over_tp(rule, parameters[rule.name], tp_group)
        else:
            shape, dtype = stages[owner][rule.name]
            found = [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]
        if pp_group is not None and len(stages) > 1:
            for shard in found:
                dist.broadcast(shard, dist.get_global_rank(pp_group, owner), group=pp_group)
        return found

    return shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What this rank holds of a whole Hugging Face tensor."""

    plan: TensorPlan
    """The whole tensor."""
    dim: int | None
    """Cut over tensor-parallel ranks; None: every rank holds all of it."""
    extents: tuple[tuple[int, int], ...]
    """Where each rank's part starts and stops along `dim`."""
    rank: int
    """This one's place among them."""
    own: Tensor
    """A view of the parameter; its rows may lie in two dims, see `Rule.views`."""

    def place(self, whole: Tensor) -> None:
        """Put this rank's part where it belongs; what all hold is put there by the first."""
        if self.dim is not None:
            self.part(whole, self.rank).view(self.own.shape).copy_(self.own)
        elif self.rank == 0:
            whole.copy_(self.own)

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part of `whole`, which is cut."""
        assert self.dim is not None
        start, stop = self.extents[rank]
        return whole.narrow(self.dim, start, stop - start)


def stage_slices(parameters: Mapping[str, Tensor], spec: ModelSpec, tp_rank: int, tp_size: int) -> Iterator[Slice]:
    """This rank's part of each tensor of its pipeline stage, in the order of `plan_stage`; sends nothing."""
    for rule in rules(spec, uses_te_names(parameters)):
        if not rule.exported or rule.name not in parameters:
            continue
        local = parameters[rule.name].detach()
        for index, (name, shape, own) in enumerate(zip(rule.hf, rule.shapes, rule.views(local), strict=True)):
            extents: tuple[tuple[int, int], ...] = ()
            if rule.dim is not None:
                extents = tuple(rule.extent(index, rank, tp_size, local.shape[0]) for rank in range(tp_size))
            if rule.vocabulary:
                start, stop = extents[tp_rank]
                own = own[: stop - start]  # without padding
            yield Slice(plan=TensorPlan(name, shape, local.dtype), dim=rule.dim, extents=extents, rank=tp_rank, own=own)


def gather_first(slices: Iterable[Slice], tp_group: ProcessGroup | None) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by name on the first of the tensor-parallel ranks; the others' stream is empty.

    Collective over them: the others send while they run through it. A slice of rows arrives where it belongs; nothing
    that all hold is sent.
    """
    for one in slices:
        if one.dim is None or tp_group is None:
            if one.rank == 0:
                yield one.plan.name, one.own.reshape(one.plan.shape)
        elif one.rank > 0:
            if one.own.numel():
                dist.send(one.own.contiguous(), group=tp_group, group_dst=0)
        else:
            yield one.plan.name, _received(one, tp_group)
        del one


def _received(own: Slice, tp_group: ProcessGroup) -> Tensor:
    whole = own.own.new_empty(own.plan.shape)
    arriving = []
    for rank in range(1, len(own.extents)):
        place = own.part(whole, rank)
        if place.numel():
            part = place if place.is_contiguous() else torch.empty_like(place)
            arriving.append((dist.irecv(part, group=tp_group, group_src=rank), part, place))
    own.place(whole)
    for work, part, place in arriving:
        work.wait()
        if part is not place:
            place.copy_(part)
    return whole


def plan_stage(parameters: Mapping[str, Tensor], spec: ModelSpec) -> list[TensorPlan]:
    """The whole tensors of a pipeline stage, in the order of `stage_slices`; not collective."""
    return [
        TensorPlan(name, shape, parameters[rule.name].dtype)
        for rule in rules(spec, uses_te_names(parameters))
        if rule.exported and rule.name in parameters
        for name, shape in zip(rule.hf, rule.shapes, strict=True)
    ]


def _over_tp(rule: Rule, parameter: Tensor, tp_group: ProcessGroup | None) -> list[Tensor]:
    """A parameter's shards of all tensor-parallel ranks; one where every rank holds all of it."""
    local = parameter.detach().contiguous()
    if rule.dim is None or tp_group is None:
        return [local]
    found = [torch.empty_like(local) for _ in range(tp_group.size())]
    dist.all_gather(found, local, group=tp_group)
    return found
