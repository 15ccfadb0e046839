"""python -m moe_runtime …"""

from moe_runtime.cli.app import run

run()
