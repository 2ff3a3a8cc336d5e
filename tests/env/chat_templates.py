"""Chat templates that render as those of the released checkpoints, without tools and image lists."""

from __future__ import annotations

QWEN2_5_VL = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN3_VL_INSTRUCT = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_REASONING_HISTORY = """\
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set content = message.content|trim %}
        {%- if not (content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}
            {%- set ns.searching = false %}
            {%- set ns.last_query = messages|length - 1 - loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = CONTENT %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query %}
            {%- set content = '<think>\\n' + reasoning + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
"""
"""Assistant messages before the last query lose their reasoning; later ones always have a block."""

QWEN3_VL_THINKING = (
    _REASONING_HISTORY.replace("CONTENT", "message.content")
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)

_QWEN3_5 = (
    """\
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
{%- endfor %}
"""
    + _REASONING_HISTORY.replace("CONTENT", "message.content|trim").replace(
        "{%- for message in messages %}\n    {%- set content",
        "{%- if ns.searching %}{{- raise_exception('No user query found in messages.') }}{% endif %}\n"
        "{%- for message in messages %}\n    {%- set content",
    )
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if CONDITION %}{{- '<think>\\n\\n</think>\\n\\n' }}{% else %}{{- '<think>\\n' }}{% endif %}
{%- endif %}"""
)
QWEN3_5 = _QWEN3_5.replace("CONDITION", "enable_thinking is defined and enable_thinking is false")
"""Sizes from 4B."""
QWEN3_5_SMALL = _QWEN3_5.replace("CONDITION", "enable_thinking is not defined or enable_thinking is not true")
"""0.8B and 2B: no reasoning unless `enable_thinking` is set."""
