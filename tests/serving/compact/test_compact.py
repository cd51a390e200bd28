"""The compact model: its features are the model's own first layer, its labels what loops find, its choices feasible."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from amoeba_plugin.data.multiple_choice import Question
from amoeba_plugin.data.prompted import PromptedQuestion, prompted
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.errors import ArtifactError, DataError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.serving.answer import Request
from amoeba_plugin.serving.compact.features import Features
from amoeba_plugin.serving.compact.files import load_compact, save_compact
from amoeba_plugin.serving.compact.heads import Choices
from amoeba_plugin.serving.compact.labels import rightness, saliency, self_information, shortened
from amoeba_plugin.serving.compact.reader import CompactModel, interpolated, likeliest
from amoeba_plugin.serving.compact.training import Read, trained_decisions, trained_scores
from amoeba_plugin.serving.compact.tune import Asked, tune_decisions, tuned_on
from amoeba_plugin.serving.feasible import Asked as AskedOfTime
from amoeba_plugin.serving.feasible import Prompt, feasible
from amoeba_plugin.serving.slo import Latency, Slo
from amoeba_plugin.shape import ShapeSpace, SubnetShape
from amoeba_plugin.testing.flows import tokenizer
from amoeba_plugin.testing.random_models import attach_random_smol
from support.elastic_files import write_elastic
from support.models import make_tiny_model, random_elastic
from support.questions import write_questions

SHARES = (Fraction(1), Fraction(1, 2))
QUESTION = PromptedQuestion((1, 5, 9, 31, 2, 77, 12, 40), range(1, 6), ((7, 3), (8,), (21, 4, 6)), 2)
ARCHITECTURES = ["llama", "gemma3_text", "qwen3", "gpt_neox"]


def loose(live: ElasticModel) -> list[PromptedQuestion]:
    draw = torch.Generator().manual_seed(3)
    return [
        PromptedQuestion(
            tuple(torch.randint(3, 90, (12,), generator=draw).tolist()), range(1, 9),
            tuple(tuple(torch.randint(3, 90, (2,), generator=draw).tolist()) for _ in range(3)), number % 3,
        )
        for number in range(12)
    ]  # fmt: skip


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("adapted", [False, True])
def test_features_are_those_of_the_whole_first_layer_whatever_shape_is_active(
    model_type: str, layers: int, adapted: bool
):
    live = random_elastic(make_tiny_model(model_type))
    if adapted:
        attach_random_smol(live)
    features = Features(live, layers)
    hidden = live.model(torch.tensor([QUESTION.prompt]), output_hidden_states=True).hidden_states[layers][0]
    norm = next(
        module
        for name, module in live.adapter.decoder(live.model).named_children()
        if name in ("norm", "final_layer_norm")
    )
    expected = norm(hidden)
    for shape in ("4x1", "2x1/2", "3x3/4"):
        live.set_shape(shape)
        assert torch.equal(features(QUESTION.prompt), expected)
    assert features.size == expected.shape[1]


def test_features_hold_no_weights_of_their_own_and_may_be_taken_while_the_model_computes():
    live = random_elastic(make_tiny_model("llama"))
    features = Features(live, 1)
    own = {each.data_ptr() for each in live.model.parameters()}
    assert {each.data_ptr() for each in features._decoder.parameters()} <= own
    expected, done, wrong = features(QUESTION.prompt), threading.Event(), []

    def reads() -> None:
        while not done.is_set():
            wrong.extend([] if torch.equal(features(QUESTION.prompt), expected) else [1])

    reader = threading.Thread(target=reads)
    reader.start()
    ids = torch.tensor([QUESTION.prompt])
    for turn in range(30):
        live.set_shape(["4x1", "2x1/2", "3x3/4"][turn % 3])
        live.model(ids)
    done.set()
    reader.join()
    assert not wrong


def alone(subnet: PreTrainedModel, prompt: list[int], choice: tuple[int, ...]) -> float:
    """Return the mean log-probability of a choice, a token at a time."""
    tokens, found = list(prompt), []
    for token in choice:
        found.append(float(subnet(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[token]))
        tokens.append(token)
    return sum(found) / len(found)


@torch.no_grad()
def test_labels_are_what_each_subnet_alone_says_token_by_token():
    live = random_elastic(make_tiny_model("llama"))
    choices = Choices(tuple(live.space), (Fraction(1), Fraction(2, 5)))
    scores = [0.0, 3.0, 1.0, 2.0, 2.0, 5.0, 0.0, 0.0]
    found = rightness(live, [QUESTION], [scores], choices)
    assert live.shape == live.space.largest
    for row, shape in enumerate(choices.shapes):
        subnet = extract(live, shape)
        for column, kept in enumerate([list(QUESTION.prompt), [1, 5, 77, 12, 40]]):
            likely = [alone(subnet, kept, choice) for choice in QUESTION.choices]
            assert bool(found[0, row, column]) == (max(likely) == likely[QUESTION.answer])
    smallest = extract(live, live.space.smallest)
    nats = [
        -float(smallest(torch.tensor([QUESTION.prompt[:count]])).logits[0, -1].log_softmax(-1)[QUESTION.prompt[count]])
        for count in range(1, len(QUESTION.prompt))
    ]
    assert self_information(live, QUESTION).tolist() == pytest.approx([0.0, *nats], abs=1e-4)


def test_saliency_is_what_a_small_step_along_each_embedding_does():
    live = random_elastic(make_tiny_model("llama"))
    choice = QUESTION.choices[QUESTION.answer]
    ids = torch.tensor([[*QUESTION.prompt, *choice]])
    found = saliency(live, QUESTION).tolist()
    assert all(parameter.grad is None for parameter in live.model.parameters())
    embedded = live.model.get_input_embeddings()(ids).detach().double()
    model = live.model.double()

    def lost(scale: float, position: int) -> float:
        moved = embedded.clone()
        moved[0, position] *= 1 + scale
        logits = model(inputs_embeds=moved).logits[0, len(QUESTION.prompt) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(choice)))

    with torch.no_grad():
        slopes = [abs(lost(1e-2, each) - lost(-1e-2, each)) / 2e-2 for each in range(len(QUESTION.prompt))]
    assert found == pytest.approx(slopes, rel=2e-2, abs=1e-4)


def test_the_whole_share_is_the_prompt_as_it_was():
    assert shortened(QUESTION, [0.0] * 8, Fraction(1)) == list(QUESTION.prompt)


def test_heads_learn_what_features_tell_and_no_more():
    draw = torch.Generator().manual_seed(0)
    reads, labels, right = [], [], torch.zeros(40, 2, 2, dtype=torch.bool)
    for number in range(40):
        features = torch.randn(20, 8, generator=draw)
        droppable = torch.arange(20) < 15
        features[~droppable, 0] = 3.0 * (number % 2)  # the question tells which shape answers it
        reads.append(Read(features, droppable))
        labels.append(features[:, 1].exp())
        right[number, 0], right[number, 1] = True, bool(number % 2)
    head, explained = trained_scores(reads, labels)
    noise = trained_scores(reads, [torch.rand(20, generator=draw) for _ in reads])[1]
    assert (explained, noise) == (pytest.approx(1, abs=0.5), pytest.approx(0, abs=0.1))
    seen = head(reads[0].features).detach()
    assert float(torch.corrcoef(torch.stack([seen, reads[0].features[:, 1]]))[0, 1]) > 0.8
    choices = Choices((SubnetShape.parse("4x1"), SubnetShape.parse("2x1")), (Fraction(1), Fraction(1, 2)))
    decisions, nats = trained_decisions(reads, right, choices)
    assert nats < 0.1  # the mean alone costs 0.35
    for number in (0, 1):
        logits = decisions(decisions.summary(reads[number].features, reads[number].droppable)[None])[0]
        assert bool((logits[1] > 0).all()) == bool(number)
        assert bool((logits[0] > 0).all())


def test_the_likeliest_feasible_decision_is_taken_and_of_equal_ones_the_lightest():
    space = ShapeSpace((4, 2), (Fraction(1),))
    choices = Choices(tuple(space), (Fraction(1), Fraction(1, 2)))

    def found(slo: str, logits: list[list[float]]) -> str:
        asked = AskedOfTime(Prompt(20, 10), 1, Slo.parse(slo))
        given = feasible(space, lambda shape, tokens: Latency(tokens * shape.depth * 1.0, 1.0 * shape.depth), asked)
        return str(likeliest(given, choices, torch.tensor(logits)))

    assert found("", [[1.0, 0.0], [0.0, 0.0]]) == "4x1 on 100% of the prompt"
    assert found("tpot<=50%", [[1.0, 0.0], [0.2, 0.1]]) == "2x1 on 100% of the prompt"
    assert found("ttft<=80%", [[1.0, 0.5], [0.2, 0.1]]) == "4x1 on 60% of the prompt"  # between 1 and 1/2, by a line
    assert found("", [[1.0, 1.0], [1.0, 1.0]]) == "2x1 on 10% of the prompt"
    assert interpolated(torch.tensor([3.0, 1.0]), (Fraction(1), Fraction(1, 2)), Fraction(1, 5)) == 1.0


def test_what_is_written_reads_the_same_in_another_place_and_only_for_its_model(tmp_path: Path):
    live = random_elastic(make_tiny_model("llama"))
    model, tuned = tuned_on(live, loose(live), Asked("", shares=SHARES))
    save_compact(model, live.strategy.fingerprint, tuned, tmp_path)
    loaded, about = load_compact(tmp_path, random_elastic(make_tiny_model("llama")))
    request = Request(QUESTION.prompt, droppable=QUESTION.droppable)
    first, second = model(request), loaded(request)
    assert (first.scores, about.tuned) == (second.scores, tuned)
    asked = AskedOfTime(Prompt(8, 5), 1, Slo.parse("ttft<=60%"))
    given = feasible(live.space, lambda shape, tokens: Latency(tokens * float(shape.width), 1.0), asked)
    assert first.wanted(given) == second.wanted(given) is not None
    with pytest.raises(ArtifactError, match="of another elastic model"):
        load_compact(tmp_path, random_elastic(make_tiny_model("llama", seed=1)))
    (tmp_path / "compact.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="is damaged, or of another model"):
        load_compact(tmp_path, live)
    (tmp_path / "compact.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"is not a compact model that `amoeba tune-decisions` made"):
        load_compact(tmp_path, live)


def test_the_command_learns_from_a_file_of_questions_and_writes_all_or_nothing(tmp_path: Path):
    live = write_elastic(tmp_path)
    data = write_questions(tmp_path / "questions.jsonl", 14)
    tuned = tune_decisions(tmp_path / "elastic", tmp_path / "compact", Asked(data, shots=2, shares=SHARES))
    assert tuned.questions == 12
    assert all(0 <= each <= 1 for row in tuned.right for each in row)
    model, about = load_compact(tmp_path / "compact", live)
    assert about.shares == ["1", "1/2"]
    assert isinstance(model, CompactModel)
    for wrong, error, words in (
        (Asked(write_questions(tmp_path / "few.jsonl", 9)), DataError, "has 9 questions besides 0 examples; 10 are"),
        (Asked(data, labels="salience"), DataError, "no labels 'salience'.*Did you mean.*saliency"),
        (Asked(data, shots=2, max_seq_length=8), DataError, "tokens with its examples and its longest choice"),
    ):
        with pytest.raises(error, match=words):
            tune_decisions(tmp_path / "elastic", tmp_path / "other", wrong)
        assert not (tmp_path / "other").exists()
    with pytest.raises(ArtifactError, match="is not empty; name a new directory"):
        tune_decisions(tmp_path / "elastic", tmp_path / "compact", Asked(data))


def test_context_and_examples_may_be_left_out_and_the_question_not():
    words = tokenizer()
    example = Question("Which?", ("this", "that"), 1)
    asked = Question("What now?", ("stop", "go on"), 1, context="A story.")
    found = prompted(asked, [example], words, False, 200)
    text = words.decode([found.prompt[each] for each in found.droppable])
    assert text.replace(" ", "") == "Which?\nAnswer:that\n\nAstory.\n".replace(" ", "")
    rest = words.decode(list(found.prompt[found.droppable.stop :]))
    assert rest.replace(" ", "") == "Whatnow?\nAnswer:".replace(" ", "")
    for choice, ending in zip(found.choices, asked.choices, strict=True):
        whole = words(f"Which?\nAnswer: that\n\nA story.\nWhat now?\nAnswer: {ending}", add_special_tokens=False)
        assert [*found.prompt, *choice][-len(whole["input_ids"]) :] == whole["input_ids"]
    assert not prompted(Question("What now?", ("stop", "go"), 1), [], words, False, 200).droppable
