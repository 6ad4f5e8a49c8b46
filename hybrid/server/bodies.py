"""What the endpoints are asked, as their APIs define it. Fields that are not named here are ignored.

Types are strict: a number in quotes is refused. Null is what a client sends for a field that it leaves out.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hybrid.serving.request import MOST_LOGPROBS

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Top = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
MOST_CHOICES = 128


class Body(BaseModel):
    """A JSON object."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True, protected_namespaces=())


class StreamOptions(Body):
    """include_usage: whether a last event has the token counts."""

    include_usage: bool | None = None


class Sampled(Body):
    """What all kinds of answers have: how tokens are picked, and after how many seconds the answer is given up."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    timeout: Seconds | None = None


class OpenAIBody(Sampled):
    """What chats and completions of OpenAI's API share."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Number] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream's last event is to have the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(OpenAIBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class CompletionBody(OpenAIBody):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Top | None = None
    suffix: str | None = None


class TextOptions(Body):
    """format: what an answer must look like."""

    format: dict[str, Any] | None = None


class ResponsesBody(Sampled):
    """`POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Top | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    parallel_tool_calls: bool | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None


class CountBody(Body):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class MessagesBody(CountBody, Sampled):
    """`POST /v1/messages`."""

    max_tokens: Count
    stop_sequences: Annotated[list[str], Field(max_length=64)] | None = None


class TokenizeBody(Body):
    """`POST /tokenize`; add_special: whether the tokenizer adds what it puts around a text."""

    content: str
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    tokens: list[Token]
