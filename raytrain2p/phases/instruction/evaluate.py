"""What phase 2 measures: how often or how nearly the answer is the expected one, and whether it depends on the media."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from raytrain2p.data.batches import MicroBatch, Ragged
from raytrain2p.data.chat import ChatFormat, load_chat_format
from raytrain2p.data.records import Record
from raytrain2p.data.scores import token_f1
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.pretrained import model_directory
from raytrain2p.models.token_loss import token_loss
from raytrain2p.phases.base import Answer
from raytrain2p.phases.inputs import MediaTable
from raytrain2p.phases.instruction.data import InstructionSplit
from raytrain2p.phases.instruction.module import InstructionModule


@torch.inference_mode()
def evaluate(
    module: InstructionModule, data: Mapping[str, InstructionSplit], tests: list[str], group: WorkerGroup
) -> tuple[dict[str, float], list[Answer]]:
    """Loss, exact match and token F1 by task on each test split. To compare: exact match with media shuffled, and of the best
    constant answer (majority).

    Returns:
        Metrics by name, and sample answers.
    """
    settings = module.settings.evaluation
    chat = load_chat_format(model_directory(module.settings.model.language_model), module.assistant.soft_tokens, None)
    metrics: dict[str, float] = {}
    answers: list[Answer] = []
    for name in tests:
        split = data[name]
        for task in sorted(set(split.tasks)):
            chosen = choose(split, task, settings.max_records, module.settings.seed)
            found = score(module, split, chosen, group)
            metrics[f"{name}/loss/{task}"] = found.loss
            metrics[f"{name}/exact_match/{task}"] = found.exact
            metrics[f"{name}/token_f1/{task}"] = found.exact + f1_sum(module, split, found.wrong, group, chat) / len(chosen)
            learnt = slice(-1, None) if module.settings.data.loss_on == "last" else slice(None)
            commonest = Counter(tuple(split.records[record].answers[learnt]) for record in chosen).most_common(1)[0][1]
            metrics[f"{name}/majority/{task}"] = commonest / len(chosen)
            if settings.shuffled and any(table.items.lengths[chosen].sum() > 1 for table in split.tables.values()):
                shuffled = replace(split, tables=shuffle_media(split.tables, chosen, module.settings.seed))
                metrics[f"{name}/exact_match_shuffled/{task}"] = score(module, shuffled, chosen, group).exact
        answers += sample_answers(module, name, split, settings.samples, group, chat)
    return metrics, answers


def choose(split: InstructionSplit, task: str, most: int | None, seed: int) -> np.ndarray:
    """Record numbers of a task, at most `most` of them, drawn by seed."""
    of_task = np.flatnonzero(np.array(split.tasks) == task)
    if most is None or len(of_task) <= most:
        return of_task
    return np.sort(np.random.default_rng(seed).choice(of_task, most, replace=False))


def shuffle_media(tables: Mapping[str, MediaTable], chosen: np.ndarray, seed: int) -> dict[str, MediaTable]:
    """Each item of the chosen records is replaced by one of another place: a random cycle, so that none keeps its own."""
    return {modality: replace(table, items=shuffle_items(table.items, chosen, seed)) for modality, table in tables.items()}


def shuffle_items(items: Ragged, chosen: np.ndarray, seed: int) -> Ragged:
    """The same numbers of items per record, with those of the chosen records moved."""
    places = np.concatenate([np.arange(end - length, end) for end, length in zip(items.ends[chosen], items.lengths[chosen], strict=True)])
    if len(places) < 2:
        return items
    random = np.random.default_rng(seed)
    order = random.permutation(places)
    _, number, counts = np.unique(items.flat[order], return_inverse=True, return_counts=True)
    order = order[np.argsort(random.permutation(len(counts))[number], kind="stable")]
    shuffled = copy.copy(items)
    shuffled.flat = items.flat.copy()
    shuffled.flat[order] = items.flat[np.roll(order, counts.max())]
    return shuffled


class Score(NamedTuple):
    """Mean loss per token, the share of records that are answered exactly, and the numbers of the others."""

    loss: float
    exact: float
    wrong: np.ndarray


def score(module: InstructionModule, split: InstructionSplit, chosen: np.ndarray, group: WorkerGroup) -> Score:
    """The loss, and which records greedy decoding answers exactly (all answers that are learnt, each after the reference's
    messages before it).

    Greedy decoding gives the reference, up to the stop token, if and only if each of its tokens is the most likely one after
    the tokens before it: one forward pass decides that, without generating.
    """
    total, tokens, wrong_here = 0.0, 0, list[int]()
    ordered = chosen[np.argsort(split.lengths[chosen], kind="stable")]
    for mine, counts in group.batches(ordered, module.settings.evaluation.batch_size):
        batch = module.assemble(module.transfer_batch_to_device(split[MicroBatch(mine, 0)], module.device, 0))
        logits, targets = module.as_forward(partial(module.assistant.supervised_logits, batch))
        if not counts:
            continue
        assert batch.supervised is not None
        records, length = batch.input_ids.shape
        wrong = torch.zeros(records, device=logits.device)
        wrong.index_add_(0, batch.supervised // length, (logits.argmax(-1) != targets).float())
        total += float(token_loss(logits, targets))
        tokens += len(targets)
        wrong_here += mine[(wrong > 0).cpu().numpy()].tolist()
    totals, counts_of_tokens, wrongs = zip(*group.gather((total, tokens, wrong_here)), strict=True)
    is_wrong = np.isin(ordered, np.concatenate(wrongs))
    return Score(sum(totals) / sum(counts_of_tokens), float((~is_wrong).mean()), ordered[is_wrong])


def f1_sum(module: InstructionModule, split: InstructionSplit, records: np.ndarray, group: WorkerGroup, chat: ChatFormat) -> float:
    """The token F1 of the last answers of records, added up. Of those that are answered exactly it is 1, without generating."""
    answers = generated(module, split, records, group, chat)
    ids, prompts = split.tokens.ids, split.tokens.prompts
    return sum(token_f1(answer, chat.text(ids[number][prompts[number] :].tolist())) for number, answer in answers.items())


def generated(
    module: InstructionModule, split: InstructionSplit, records: np.ndarray, group: WorkerGroup, chat: ChatFormat
) -> dict[int, str]:
    """Greedy answers to records, of at most `evaluation.max_new_tokens`, by record; on each worker."""
    settings, stop, answers = module.settings.evaluation, list(chat.stop_ids), dict[int, str]()
    for mine, counts in group.batches(records, settings.batch_size):
        batch = module.assemble(module.transfer_batch_to_device(split.prompts(MicroBatch(mine, 0)), module.device, 0))
        generate = partial(module.assistant.generate, together=isinstance(module, FSDPModule))
        tokens = module.as_forward(partial(generate, batch, settings.max_new_tokens, stop, stop[0]))
        if counts:
            answers |= zip(mine.tolist(), map(chat.text, tokens.tolist()), strict=True)
    return {record: answer for part in group.gather(answers) for record, answer in part.items()}


def sample_answers(
    module: InstructionModule, name: str, split: InstructionSplit, most: int, group: WorkerGroup, chat: ChatFormat
) -> list[Answer]:
    """Generated answers to a few records of a split, as rows of a table."""
    chosen = np.sort(np.random.default_rng(module.settings.seed).permutation(len(split))[:most])
    texts = generated(module, split, chosen, group, chat)
    return [answer_row(name, split.records[number], texts[number]) for number in chosen.tolist()]


def answer_row(split: str, record: Record, answer: str) -> Answer:
    """A row of the table of sample answers."""
    return {
        "split": split,
        "task": record.task,
        "question": record.question,
        "expected": record.answers[-1],
        "answer": answer,
        "media": [asdict(ref) for ref in record.media()],
    }
