"""instructor in all its modes for chat completions (https://python.useinstructor.com)."""

from collections.abc import Iterable

import instructor
import pytest
from instructor import Mode
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from openai import OpenAI
from pydantic import BaseModel, field_validator

# Modes whose requests hold the model to the schema; the others ask for it in the prompt.
HELD = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.FUNCTIONS, Mode.JSON_SCHEMA]
ASKED = [Mode.JSON, Mode.JSON_O1, Mode.MD_JSON]


class Person(BaseModel):
    name: str
    age: int


class City(BaseModel):
    """A city that the text mentions."""

    city: str


class Impossible(Person):
    @field_validator("age")
    @classmethod
    def never(cls, age):
        raise ValueError("an age has three digits")


@pytest.fixture
def make(base_url, model):
    """Return a function that extracts with a mode."""

    def make_client(mode):
        openai = OpenAI(base_url=base_url, api_key="any", max_retries=0)
        return instructor.from_openai(openai, mode=mode, model=model)

    return make_client


def create(client, text, response_model=Person, **options):
    return client.create(
        response_model=response_model,
        messages=[{"role": "user", "content": text}],
        **{"temperature": 0, "max_tokens": 80, "max_retries": 0} | options,
    )


@pytest.mark.parametrize("mode", HELD)
def test_create_returns_an_object(make, mode, people, judge):
    def is_right(right):
        person = create(make(mode), "Extract: {} is {} years old.".format(*right))
        assert isinstance(person, Person)
        return (person.name, person.age) == right

    judge(is_right, people)


@pytest.mark.parametrize("mode", ASKED)
def test_create_from_the_prompt_alone(make, mode, people, judge):
    def is_right(right):
        try:
            person = create(make(mode), "Extract: {} is {} years old.".format(*right))
        except InstructorRetryException as error:
            # The text is not JSON, or not of this schema.
            assert error.last_completion.choices[0].message.content
            return False
        return (person.name, person.age) == right

    judge(is_right, people)


def test_parallel_tools_yield_objects(make, cities, judge):
    def is_right(city):
        client = make(Mode.PARALLEL_TOOLS)
        try:
            found = [*create(client, f"Ann is 31. She lives in {city}.", Iterable[Person | City])]
        except TypeError:  # instructor's, if the model answers without a call
            return False
        assert all(isinstance(item, Person | City) for item in found)
        return {type(item).__name__ for item in found} == {"Person", "City"}

    judge(is_right, cities)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_partial_streams_the_object_as_it_grows(make, mode):
    parts = [
        *make(mode).create_partial(
            response_model=Person,
            messages=[{"role": "user", "content": "Ann is 31 years old."}],
            temperature=0,
            max_tokens=80,
            max_retries=0,
        )
    ]
    assert len(parts) > 1
    assert Person.model_validate(parts[-1].model_dump())


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_iterable_streams_objects(make, mode):
    people = [
        *make(mode).create_iterable(
            response_model=Person,
            messages=[{"role": "user", "content": "Fill the list of tasks: Ann is 31, Bob is 7."}],
            temperature=0,
            max_tokens=120,
            max_retries=0,
        )
    ]
    assert people and all(isinstance(person, Person) for person in people)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_failed_validation_is_asked_again_with_the_error(make, mode):
    """The second request has the first answer and the error: an assistant and a tool message."""
    with pytest.raises(InstructorRetryException) as caught:
        create(make(mode), "Ann is 31.", Impossible, max_retries=1)
    assert "an age has three digits" in str(caught.value)
    assert caught.value.n_attempts == 2


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_cut_document_raises(make, mode):
    with pytest.raises((InstructorRetryException, IncompleteOutputException)):
        create(make(mode), "Ann is 31.", max_tokens=3)


def test_completion_comes_with_the_object(make):
    person, completion = make(Mode.JSON_SCHEMA).create_with_completion(
        response_model=Person,
        messages=[{"role": "user", "content": "Ann is 31 years old."}],
        temperature=0,
    )
    assert isinstance(person, Person) and completion.usage.completion_tokens > 0
