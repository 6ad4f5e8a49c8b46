"""Chat templates: as transformers renders them, in a sandbox, within bounds of time, memory and nesting."""

import datetime
import json
import threading
import tracemalloc

import jinja2
import jinja2.sandbox
import pytest

from hybrid.errors import InputError, ModelError
from hybrid.formats import sandbox, templates
from hybrid.formats.templates import MAX_SOURCE, ChatTemplate

HI = [{"role": "user", "content": "Hi"}]
CHAT = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": " one\ntwo ", "tags": ["b", "a", "b"]},
    {"role": "assistant", "content": "<think>hm</think>\nthree é", "tags": []},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source, messages=HI, special=SPECIAL):
    return ChatTemplate(source, "here").render(messages, special, True)


SAME_AS_PLAIN = [
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{{ loop.index0 ~ '/' ~ loop.length }}{{ loop.nextitem is defined }}{% endfor %}",
    "{% for m in messages[1:] if m.tags %}{{ m.tags | unique | sort | join(', ') }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% set n = namespace(last=-1, l=[]) %}{% for m in messages %}{% set n.last = loop.index %}"
    "{% set n.l = n.l + [m.role] %}{% endfor %}{{ n.last }} {{ n.l }}",
    "{% macro show(m, mark='|') %}{{ mark + m.content | trim + mark }}{% endmacro %}{{ show(messages[1]) }}",
    "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}{{ messages | length }}{% endcall %}",
    "{% set text %}{% for m in messages %}{{ m.role | upper }}{% endfor %}{% endset %}{{ text | length }} {{ text }}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}{{ '<' | escape }}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ 'a,b'.split(',') }}{{ 'ab'.center(6, '-') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ messages | map(attribute='role') | join('+') }}{{ messages | rejectattr('tags') | list | length }}",
    "{{ messages | groupby('role') | map('first') | list }}{{ dict(a=1, b=2) | dictsort }}{{ {'x': (1, 2)} }}",
    "{{ 7 // 2 }}{{ 2 ** 10 }}{{ -7 % 3 }}{{ '%03d %s' % (7, 'x') }}{{ '%s' | format(1.5) }}{{ '{:>4}'.format('a') }}",
    "{{ '**{}** {{}} {:>3}'.format(1, 2) }}{{ '* %s 100%% *' % 'x' }}{{ '{a}'.format(a=[1]) }}",
    "{{ 'ab' * 3 }}{{ [1] * 2 + [3] }}{{ (1, 2) + (3,) }}{{ 3 * 'a' }}{{ 2.5 * 2 }}{{ [1, 2] == [1, 2] }}",
    "{{ 'x' in ['x', 'y'] }}{{ 'content' in messages[0] }}{{ messages[0].nothing is defined }}{{ nothing }}",
    "{{ 'a\\nb' | indent(2, true) }}{{ 'a b' | replace(' ', '_') }}{{ [1, 2.5] | sum }}{{ 1.25 | round(1) }}",
    "{{ [1, 2, 3] | batch(2) | list }}{{ [3, 1] | sort }}{{ 'abc' | list }}{{ range(3) | list }}{{ none }}{{ true }}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% block b %}B{% endblock %}{{ self.b() }}",
    "{% set a, b = 1, [2] %}{{ a + b[0] }}{% with c = 3 %}{{ c }}{% endwith %}{{ 'yes' if a else 'no' }}",
    "{{ ['a', 'b'] | join(joiner('x')()) }}{% set c = cycler('o', 'e') %}{{ c.next() }}{{ c.next() }}",
]


@pytest.mark.parametrize("source", SAME_AS_PLAIN)
def test_a_template_gives_what_plain_jinja_gives(source):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    expected = plain.from_string(source).render(messages=CHAT, **SPECIAL)
    assert render(source, CHAT) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", '{"b": "é<", "a": [1]}'),
        ("ensure_ascii=True", '{"b": "\\u00e9<", "a": [1]}'),
        ("separators=(',', ':'), sort_keys=True", '{"a":[1],"b":"é<"}'),
        ("indent=1", '{\n "b": "é<",\n "a": [\n  1\n ]\n}'),
    ],
)
def test_tojson_takes_what_transformers_takes(arguments, expected):
    assert render("{{ {'b': 'é<', 'a': [1]} | tojson(" + arguments + ") }}") == expected


def test_what_a_template_may_ask_for_is_there():
    assert render("{{ documents is none }}{{ tools is none }}{{ add_generation_prompt }}") == "TrueTrueTrue"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{%- endgeneration %}.{% endfor %}"
    assert render(marked) == "Hi."


def test_namespaces_in_circles_are_not_gone_through():
    circle = "{% set n = namespace(a=1) %}{% set n.b = [n, n] %}{{ n }}{{ n.b ~ n }}{{ n.b == n.b }}{{ n.a }}"
    assert render(circle) == "<namespace>[<namespace>, <namespace>]<namespace>True1"


def test_a_template_may_refuse_and_is_told_in_one_line():
    with pytest.raises(InputError, match=r"^the model's chat template refuses these messages: only one line$"):
        render("{{ raise_exception('only\\none   line') }}")
    with pytest.raises(InputError) as caught:
        render("{{ raise_exception('x' * 100000) }}")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source", ["{{ messages.__class__.__mro__ }}", "{{ ''|attr('__class__')|list }}{{ [].append(1) }}"]
)
def test_templates_reach_nothing_of_python(source):
    with pytest.raises(InputError, match="unsafe") as caught:
        render(source)
    assert isinstance(caught.value.__cause__, jinja2.sandbox.SecurityError)


def test_a_message_that_the_template_would_leave_out_is_refused():
    only_users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="the role of message 0 is 'usr'"):
        render(only_users, [{"role": "usr", "content": "Hi"}])
    with pytest.raises(InputError, match="message 0 has no 'content'"):
        render(only_users, [{"role": "user"}])


def doubled(start, step, end=""):
    return f"{{% set n = namespace(x={start}) %}}{{% for i in range(99) %}}{step}{{% endfor %}}{end}"


LOOP = "{% for a in range(100000) %}"
MUCH = {  # a small template, that would make much of little
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "written in a loop": LOOP + "word" * 1000 + "{% endfor %}",
    "written in a macro": "{% macro m() %}" + LOOP + "word" * 1000 + "{% endfor %}{% endmacro %}{{ m() }}",
    "printed in a loop": LOOP + "{{ 'a' * 1000 }}{% endfor %}",
    "calls in calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "repeated text": "{{ 'a' * 10**9 }}",
    "repeated list": "{{ (10**9 * [1]) | length }}",
    "joined doubles": doubled("'a'", "{% set n.x = n.x ~ n.x %}"),
    "added doubles": doubled("'a'", "{% set n.x = n.x + n.x %}"),
    "printed doubles": doubled("'a'", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "kept slices": doubled("[]", "{% set n.x = n.x + [('a' * 9000)[i:]] %}"),
    "lists of the same list": doubled("[]", "{% set n.x = [n.x, n.x] %}", "{{ n.x }}"),
    "tuples as keys": doubled("()", "{% set n.x = (n.x, n.x) %}", "{{ {n.x: 1} }}"),
    "mappings": doubled("1", "{% set n.x = dict(a=n.x, b=n.x) %}", "{{ n.x | tojson }}"),
    "views": doubled("{}", "{% set n.x = {1: n.x.items(), 2: n.x.items()} %}", "{{ n.x }}"),
    "varargs": "{% macro m() %}{% set n.x = varargs %}{% endmacro %}" + doubled("1", "{{ m(n.x, n.x) }}", "{{ n.x }}"),
    "cyclers": doubled("1", "{% set n.x = cycler(n.x, n.x).items %}", "{{ n.x }}"),
    "powers": "{{ 10 ** (10 ** 8) }}",
    "products": doubled("10", "{% set n.x = n.x * n.x %}"),
    "center": "{{ 'a'.center(10**9) }}",
    "center, a filter": "{{ 'a' | center(10**9) }}",
    "center, by name": "{{ ['a'] | map('center', 10**9) | list }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "format": "{{ '{:999999999d}'.format(1) }}",
    "format with a width": "{{ '{:{}}'.format(1, 10**9) }}",
    "format_map": "{{ '{a:999999999d}'.format_map({'a': 1}) }}",
    "format, a filter": "{{ '%999999999d' | format(1) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent with a width": "{{ '%*d' % (10**9, 1) }}{{ '%(a)*d' % 1 }}",
    "percent, many digits": "{{ ('%0' ~ '0' * 99 ~ '999999999d') % 1 }}",
    "replace": "{{ ('a' * 10000).replace('a', 'b' * 10000) }}",
    "replace, nothing": "{{ ('a' * 10000).replace('', 'b' * 10000) }}",
    "replace, a filter": "{{ ('a' * 10000) | replace('a', 'b' * 10000) }}",
    "join": "{{ ('b' * 10000).join(['a'] * 10000) }}",
    "join, a filter": "{{ range(10000) | join('b' * 10000) }}",
    "indent": "{{ ('\\n' * 9000) | indent(1000, true, true) }}",
    "indent by text": "{{ ('\\n' * 9000) | indent('a' * 10000, true, true) }}",
    "tojson": "{{ ([1] * 999) | tojson(indent=10**8) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "sums of lists": "{{ ([[1] * 100] * 1000) | sum(start=[]) | length }}",
    "letters": "{{ ('é' * 30000) | list | length }}",
    "the step itself": "{{ [-10**9] | map('step of a loop') | list }}{{ 'a' * 10**8 }}",
    "sorted copies": "{{ (['a' * 3000 + 'b', 'a' * 3000 + 'c'] * 1000) | sort | length }}",
    "range": "{{ range(10**9) | list }}",
}


@pytest.mark.parametrize("name", MUCH)
def test_a_template_that_would_make_too_much_is_ended_before_it_has(name, monkeypatch):
    monkeypatch.setattr(templates, "_BYTES", 2**16)
    template = ChatTemplate(MUCH[name], "here")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"refuses these messages: (it (makes|asks|formats|sums) |Range too big)"):
            template.render(HI, {}, True)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% block b %}{{ self.b() }}{% endblock %}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    ],
)
def test_a_template_that_calls_itself_or_nests_without_end(source):
    with pytest.raises(InputError, match="refuses these messages: it is nested or calls itself too deeply"):
        render(source)


def test_time_is_bounded_on_every_thread(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    template = ChatTemplate(LOOP + "{% for b in range(100000) if false %}{% endfor %}{% endfor %}", "here")
    errors = []

    def work():
        try:
            template.render(HI, {}, True)
        except InputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join(20)
    assert errors == ["the model's chat template refuses these messages: it works for more than 0.05 seconds"] * 3


def test_a_long_conversation_may_be_gone_through_again_and_again():
    """As real templates do: for each message all messages are looked through, and the text so far is copied."""
    source = (
        "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t + m.content | trim %}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{% for o in messages %}{% if o.role == 'user' and loop.index > 9999 %}x{% endif %}{% endfor %}{% endfor %}"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 30} for i in range(80)]
    assert render(source, messages) == "40" * 80


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% broken", "is not valid"),
        ("{% if a %}" * 1000 + "{% endif %}" * 1000, "is not valid .it is nested or calls itself too deeply"),
        ("{{" + "[" * 1000 + "]" * 1000 + "}}", "is not valid .it is nested or calls itself too deeply"),
        ("{% for a in b %}" * 25 + "{% endfor %}" * 25, "is not valid .too many statically nested blocks"),
        ("{{ a | urlize }}", "is not valid .No filter named 'urlize'"),
        ("{{ " + "1" * 5000 + " }}", "is not valid"),
        ("a" * (MAX_SOURCE + 1), "has 131,073 characters, at most 131,072 are read"),
    ],
)
def test_templates_that_cannot_be_compiled(source, message):
    with pytest.raises(ModelError, match=f"the chat template in here {message}") as caught:
        ChatTemplate(source, "here")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_nothing_is_computed_while_a_template_is_compiled():
    ChatTemplate(
        "{{ 'a' | center(10**9) }}{{ 'a' * 10**9 }}{% set x = 'a'.center(10**9) %}{% if 'a' * 10**9 %}{% endif %}", ""
    )


# Where a template comes from


def read(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTemplate.read(folder)


def test_the_file_of_its_own_wins(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("F{{ messages[0]['content'] }}")
    assert read(tmp_path, chat_template="C").render(HI, {}, True) == "FHi"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is not readable text"):
        read(tmp_path, chat_template="C")


def test_named_templates(tmp_path):
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    assert read(tmp_path, chat_template=named).render(HI, {}, True) == "D"
    assert read(tmp_path, chat_template={"default": "D"}).render(HI, {}, True) == "D"
    assert read(tmp_path, chat_template=named[:1]) is None and read(tmp_path) is None


def test_a_template_that_is_no_text(tmp_path):
    with pytest.raises(ModelError, match="is of type int, expected text"):
        read(tmp_path, chat_template=5)


def test_tools_are_given_to_a_template_that_knows_them():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    template = ChatTemplate("{% if tools %}{{ tools[0] | tojson }}{% else %}none{% endif %}", "here")
    assert template.knows_tools and not ChatTemplate("{{ messages[0].content }}{# toolset #}", "here").knows_tools
    assert template.render(HI, SPECIAL, True, tools) == json.dumps(tools[0])
    assert template.render(HI, SPECIAL, True) == template.render(HI, SPECIAL, True, []) == "none"
