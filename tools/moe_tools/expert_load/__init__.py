"""The expert-load tool: record, report, plan, apply, compare, top. `python -m moe_tools.expert_load --help`."""
