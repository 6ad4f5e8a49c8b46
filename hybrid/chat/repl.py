"""The chat loop: reads messages and commands, streams answers, keeps the conversation.

It knows no terminal and no model, only `protocols`, so a test can feed it a transcript. Everything runs on the calling
thread. A turn commits the conversation at its end, in one assignment: whatever ends a turn early leaves it as it was.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hybrid.chat.conversation import Conversation, Message, load_conversation, read_text_file, save_conversation
from hybrid.chat.interrupts import InterruptGuard
from hybrid.chat.protocols import ChatModel, Terminal
from hybrid.chat.screen import reading
from hybrid.errors import ContextError, HybridError, InputError
from hybrid.generation import FinishReason, GenerationStats, GenerationStep, SamplingSettings


@dataclass(frozen=True)
class Command:
    """One command of the chat: the method of `Repl` that runs it, its argument as /help shows it, and one line of help.

    An argument in brackets may be left out; an empty one means that the command takes none.
    """

    run: Callable[[Repl, str], None]
    argument: str
    help: str


class Repl:
    """The state of one chat, and one method per command."""

    def __init__(
        self,
        model: ChatModel,
        terminal: Terminal,
        settings: SamplingSettings,
        guard: InterruptGuard,
        system: str | None = None,
        model_name: str | None = None,
    ) -> None:
        self.conversation = Conversation(system)
        self.settings = settings
        self.leaving = False
        self.shows_stats = True
        self._model = model
        self._terminal = terminal
        self._guard = guard
        self._model_name = model_name
        self._attached: list[str] = []
        self._last: GenerationStats | None = None

    def handle(self, text: str) -> None:
        """Run one line of input, a command where it starts with `/`; raises `HybridError` when it cannot be done."""
        if text.startswith("/"):
            self._run_command(text)
        elif text.strip():
            content = "\n\n".join([*self._attached, text.strip()])
            if self._turn(self.conversation.with_message(Message("user", content))):
                self._attached = []

    def _run_command(self, text: str) -> None:
        slashed, *rest = text.split(maxsplit=1)
        word = slashed[1:]
        argument = rest[0].strip() if rest else ""
        if word not in COMMANDS:
            near = difflib.get_close_matches(word.lower(), COMMANDS, n=1, cutoff=0.5)
            hint = f", the nearest is /{near[0]}" if near else ""
            raise InputError(f"unknown command /{word}{hint}; /help lists all")
        command = COMMANDS[word]
        if argument and not command.argument:
            raise InputError(f"/{word} takes no argument, found {argument!r}")
        if not argument and command.argument and not command.argument.startswith("["):
            raise InputError(f"/{word} needs an argument: /{word} {command.argument}")
        command.run(self, argument)

    # One turn

    def _turn(self, asked: Conversation) -> bool:
        """Answer `asked`, which ends with the user's message; both are kept, and True returned, unless Ctrl-C came
        before the answer."""
        asked = self._fit(asked)
        text, last, stopped = self._stream(asked)
        kept = bool(text) or not stopped
        if kept:
            self.conversation = asked.with_message(Message("assistant", text, partial=stopped))
            self._report(text, last, stopped)
        else:
            self._notice("stopped before the answer began; the conversation is as it was")
        if stopped and not self._terminal.interactive:
            raise KeyboardInterrupt
        return kept

    def _fit(self, asked: Conversation) -> Conversation:
        """`asked` without its oldest exchanges, as many as leave room for an answer."""
        context = self._model.context
        reserve = min(self.settings.max_new_tokens, context // 4)
        fitted = asked
        tokens = self._model.count_tokens(fitted.for_template())
        while tokens + reserve > context and len(fitted.messages) > 1:
            fitted = fitted.without_first(2)
            tokens = self._model.count_tokens(fitted.for_template())
        if tokens >= context:
            raise ContextError(
                f"the message takes {tokens} tokens with its system prompt, the context holds {context} and an answer "
                "needs some; shorten it"
            )
        dropped = len(asked.messages) - len(fitted.messages)
        if dropped:
            self._notice(f"dropped the oldest {dropped} messages to fit the context of {context} tokens")
        return fitted

    def _stream(self, asked: Conversation) -> tuple[str, GenerationStep | None, bool]:
        """Show the answer as it comes; returns its text, its last step and whether Ctrl-C stopped it."""
        pieces: list[str] = []
        last = None
        stopped = False
        with contextlib.closing(self._model.reply(asked.for_template(), self.settings, self._show_reading)) as steps:
            try:
                if self._guard.pressed:  # while the prompt was counted
                    raise KeyboardInterrupt
                with self._guard.allowed():
                    for last in steps:
                        pieces.append(last.text)
                        self._terminal.write(last.text)
                        if self._guard.pressed:
                            raise KeyboardInterrupt
            except KeyboardInterrupt:
                stopped = True
            finally:
                self._terminal.status("")
                text = "".join(pieces)
                if text and not text.endswith("\n"):
                    self._terminal.write("\n")
        return text, last, stopped

    def _show_reading(self, done: int, total: int) -> None:
        self._terminal.status(reading(done, total))

    def _report(self, text: str, last: GenerationStep | None, stopped: bool) -> None:
        if stopped:
            self._notice("stopped; the partial answer is kept, /undo or /regen changes that")
        elif not text.strip():
            self._notice("the answer is empty; /regen asks again, /undo removes it")
        if last is not None:
            if early := early_end(last.finish, self.settings, self._model.context):
                self._notice(early)
            self._last = last.stats
            if self.shows_stats:
                self._notice(last.stats.summary(self._terminal.columns))

    def _notice(self, text: str) -> None:
        self._terminal.line(text, "notice")

    def _info(self, text: str) -> None:
        self._terminal.line(text, "info")

    # Commands

    def _help(self, argument: str) -> None:
        usages = {f"/{name} {command.argument}".rstrip(): command.help for name, command in COMMANDS.items()}
        width = max(map(len, usages))
        lines = [f"{usage:{width}}  {text}" for usage, text in usages.items()]
        self._info("\n".join([*lines, *_KEYS]))

    def _exit(self, argument: str) -> None:
        self.leaving = True

    def _clear(self, argument: str) -> None:
        self.conversation = replace(self.conversation, messages=())
        self._attached = []
        self._last = None
        self._model.reset()
        self._notice("the conversation is empty" + ("; the system prompt stays" if self.conversation.system else ""))

    def _regen(self, argument: str) -> None:
        if not self.conversation.messages:
            raise InputError("there is no answer to make anew; send a message first")
        self._turn(self.conversation.without_last(1))

    def _undo(self, argument: str) -> None:
        if not self.conversation.messages:
            raise InputError("there is nothing to undo; send a message first")
        question = " ".join(self.conversation.messages[-2].content.split())
        self.conversation = self.conversation.without_last(2)
        self._notice(f"removed with its answer: {question if len(question) <= 60 else question[:57] + '...'}")

    def _system(self, argument: str) -> None:
        if not argument:
            self._info(self.conversation.system or "there is no system prompt; /system TEXT sets one")
            return
        system = None if argument == "none" else argument
        self.conversation = replace(self.conversation, system=system)
        self._notice("the system prompt is removed" if system is None else "the system prompt is set")

    def _set(self, argument: str) -> None:
        name, *rest = argument.split(maxsplit=1) or [""]
        if name and name not in SETTINGS:
            raise InputError(f"unknown setting {name!r}, expected one of: {', '.join(SETTINGS)}")
        if rest and name == _STATS:
            self.shows_stats = _parse_switch(rest[0])
        elif rest:
            self.settings = self.settings.with_value(name, rest[0])
        self._info("\n".join(f"{key} {shown}" for key, shown in self._shown_settings().items() if name in ("", key)))

    def _shown_settings(self) -> dict[str, str]:
        values = asdict(self.settings) | {"stop": list(self.settings.stop), _STATS: "on" if self.shows_stats else "off"}
        return {name: "none" if value is None or value == [] else str(value) for name, value in values.items()}

    def _stats(self, argument: str) -> None:
        tokens = self._model.count_tokens(self.conversation.for_template()) if self.conversation.messages else 0
        messages = len(self.conversation.messages)
        lines = [f"context: {tokens} of {self._model.context} tokens, {messages} messages"]
        if self._last is not None:
            last = self._last
            lines.append(f"last prompt: {last.prompt_tokens} tokens, {last.cached_tokens} of them from the KV cache")
            lines.append(f"last answer: {last.summary()}")
            lines += filter(None, [last.times()])
        self._info("\n".join(lines))

    def _placement(self, argument: str) -> None:
        self._info(self._model.describe_placement())

    def _save(self, argument: str) -> None:
        path = _path(argument)
        save_conversation(path, self.conversation, self.settings, self._model_name)
        self._notice(f"saved {len(self.conversation.messages)} messages to {path}")

    def _load(self, argument: str) -> None:
        path = _path(argument)
        self.conversation, self.settings = load_conversation(path)
        self._attached = []
        self._last = None
        self._notice(f"loaded {len(self.conversation.messages)} messages and the settings from {path}")

    def _read(self, argument: str) -> None:
        path = _path(argument)
        text = read_text_file(path).strip()
        if not text:
            raise InputError(f"{path} is empty; give the path of a text file")
        attached = [*self._attached, text]
        alone = Conversation(self.conversation.system, (Message("user", "\n\n".join(attached)),))
        tokens = self._model.count_tokens(alone.for_template())
        if tokens >= self._model.context:
            raise ContextError(f"{path} makes a prompt of {tokens} tokens, the context holds {self._model.context}")
        self._attached = attached
        self._notice(f"read {len(text)} characters; they go before your next message")


_STATS = "stats"  # the one setting that is of the chat and not of the sampling
SETTINGS = (*SamplingSettings.names(), _STATS)

_KEYS = (
    "Enter sends, Alt-Enter starts a new line, Tab completes. Ctrl-C stops an answer, Ctrl-D leaves.",
    "A message that begins with / is sent when a space stands before it.",
)


def early_end(finish: FinishReason | None, settings: SamplingSettings, context: int) -> str:
    """Why an answer ends where its model did not end it; empty where the model did."""
    reasons = {
        "context": f"the context of {context} tokens is full",
        "length": f"max_new_tokens is {settings.max_new_tokens}",
    }
    return f"the answer ends here: {reasons[finish]}" if finish in reasons else ""


def _parse_switch(text: str) -> bool:
    if text.strip().lower() not in ("on", "off"):
        raise InputError(f"{_STATS} is {text!r}, expected on or off")
    return text.strip().lower() == "on"


def _path(argument: str) -> Path:
    if "\0" in argument:
        raise InputError(f"{argument!r} is not a path; remove the NUL character")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise InputError(f"{argument} names a home folder that is not known; give a full path") from error


COMMANDS = {
    "help": Command(Repl._help, "", "list the commands"),
    "exit": Command(Repl._exit, "", "leave, as Ctrl-D does"),
    "clear": Command(Repl._clear, "", "forget all messages, keep the system prompt and the settings"),
    "regen": Command(Repl._regen, "", "answer the last message again"),
    "undo": Command(Repl._undo, "", "remove the last message and its answer"),
    "system": Command(Repl._system, "[TEXT]", "set the system prompt, `none` removes it; alone it is shown"),
    "set": Command(Repl._set, "[NAME [VALUE]]", "change a setting; alone the settings are shown"),
    "stats": Command(Repl._stats, "", "use of the context and counters of the last answer"),
    "placement": Command(Repl._placement, "", "what is placed where"),
    "save": Command(Repl._save, "FILE", "save the conversation and the settings as JSON"),
    "load": Command(Repl._load, "FILE", "go on with a saved conversation and its settings"),
    "read": Command(Repl._read, "FILE", "put a text file before the next message"),
}


def run_repl(
    model: ChatModel,
    terminal: Terminal,
    settings: SamplingSettings,
    system: str | None = None,
    *,
    header: str = "",
    model_name: str | None = None,
) -> None:
    """Chat until the input ends or /exit. `header` is shown first, `model_name` goes into saved chats.

    Errors of a turn are one line each and the chat goes on. Ctrl-C stops an answer; where the terminal is not
    interactive it also ends the chat, by KeyboardInterrupt.
    """
    if header:
        terminal.line(header, "notice")
    with InterruptGuard() as guard, terminal.quiet():
        repl = Repl(model, terminal, settings, guard, system, model_name)
        while not repl.leaving:
            try:
                with guard.allowed():
                    text = terminal.read()
                repl.handle(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not terminal.interactive:
                    raise
                terminal.line("Ctrl-D or /exit leaves", "notice")
            except HybridError as error:
                terminal.line(f"error: {error}", "error")
