"""Jinja templates that render what `mixtral_jax.data.chat` encodes, tools and calls aside.

What a template renders is tokenized between its special tokens, each part with a space put before
it. What `encode_chat` encodes by itself begins with that space, so it needs none after a special
token, and one of its own after v1's "[/INST]".
"""

from __future__ import annotations

# Messages become turns as in data/conversation.py: neighbours of one role are one, system messages
# go to `ns.system`, and the first turn is the user's. Jinja's sandbox changes no list or dict in
# place.
_READ = r"""
{%- if tools %}{{ raise_exception('this chat template holds no tools') }}{% endif %}
{%- set ns = namespace(system=[], turns=[], before='', last_user=0, space='') %}
{%- for message in messages %}
  {%- if message.role not in ['system', 'user', 'assistant'] or message.tool_calls %}
    {{- raise_exception('this chat template holds system, user and assistant texts only') }}
  {%- endif %}
  {%- if message.content is string %}
    {%- set text = message.content %}
  {%- else %}
    {%- set text = (message.content or []) | map(attribute='text') | select | join('\n\n') %}
  {%- endif %}
  {%- if message.role == 'system' %}
    {%- set ns.system = ns.system + ([text] if text else []) %}
  {%- elif message.role == ns.before %}
    {%- set text = [ns.turns[-1].text, text] | select | join('\n\n') %}
    {%- set ns.turns = ns.turns[:-1] + [{'role': message.role, 'text': text}] %}
  {%- else %}
    {%- set ns.turns = ns.turns + [{'role': message.role, 'text': text}] %}
  {%- endif %}
  {%- set ns.before = message.role %}
{%- endfor %}
{%- if not ns.turns or ns.turns[0].role != 'user' %}
  {%- set ns.turns = [{'role': 'user', 'text': ''}] + ns.turns %}
{%- endif %}
{%- set system = ns.system | join('\n\n') + ('\n\n' if ns.system else '') %}
{{- bos_token }}"""

_END_OF_ANSWER = r"""
    {%- if not (loop.last and messages[-1].prefix) %}{{ eos_token }}{% endif %}"""

PLAIN = (
    _READ
    + r"""
{%- for turn in ns.turns %}
  {%- if turn.role == 'user' %}
    {{- ns.space + '[INST] ' + (system if loop.first else '') + turn.text + ' [/INST]' }}
    {%- set ns.space = ' ' %}
  {%- else %}
    {{- ns.space + turn.text if turn.text else '' }}"""
    + _END_OF_ANSWER
    + r"""
    {%- set ns.space = '' %}
  {%- endif %}
{%- endfor %}"""
)
"""v1, where [INST] is text."""

CONTROLS = (
    _READ
    + r"""
{%- for turn in ns.turns %}
  {%- if turn.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for turn in ns.turns %}
  {%- if turn.role == 'user' %}
    {{- '[INST]' + (system if loop.index0 == ns.last_user else '') + turn.text + '[/INST]' }}
  {%- else %}
    {{- turn.text.rstrip(' ') }}"""
    + _END_OF_ANSWER
    + r"""
  {%- endif %}
{%- endfor %}"""
)
"""v2 and v3, where [INST] is a special token."""
