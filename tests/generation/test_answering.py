"""One answer, on the host's side."""

from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.data.tokenizer import StreamDecoder
from mixtral_jax.generation.answering import Task
from mixtral_jax.generation.request import Options, Request

TOKENS = st.lists(st.integers(0, 299) | st.integers(259, 299), min_size=1, max_size=6)  # many bytes


def test_a_stop_text_ends_an_answer_where_it_ends_after_the_least_length(tokenizer):
    ids = tokenizer.encode("words in self.words")
    pieces = [tokenizer.piece(token) for token in ids]
    early, stop = pieces[1], pieces[1][-1] + pieces[2]
    assert len(ids) > 3
    options = Options(len(ids), 2, stop=(early, stop))
    task = Task.begin(0, 0, Request((1,), options), tokenizer, None)
    events = [task.push(token, None) for token in ids[:3]]
    assert [event.answer is not None for event in events] == [False, False, True]
    answer = events[-1].answer
    assert (answer.stop, answer.text) == (stop, ("".join(pieces[:2])[:-1]).lstrip())
    assert "".join(event.text for event in events) == answer.text


@given(prompt=TOKENS, answer=TOKENS)
def test_an_answer_goes_on_as_if_its_whole_prompt_had_been_streamed(tokenizer, prompt, answer):
    decoder = StreamDecoder(tokenizer)
    for token in prompt:
        decoder.push(token)
    decoder.flush()
    expected = [decoder.push(token) for token in answer]
    expected[-1] += decoder.flush()
    task = Task.begin(0, 0, Request(tuple(prompt), Options(len(answer))), tokenizer, None)
    assert [task.push(token, None).text for token in answer] == expected
