"""One answer, on the host's side."""

from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.data.tokenizer import StreamDecoder
from mixtral_jax.generation.answering import Task
from mixtral_jax.generation.request import Options, Request

TOKENS = st.lists(st.integers(0, 299) | st.integers(259, 299), min_size=1, max_size=6)  # many bytes


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
