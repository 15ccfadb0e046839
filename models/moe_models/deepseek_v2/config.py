"""config.json of DeepSeek-V2, V2-Lite and V2.5 as published or as transformers writes it."""

from __future__ import annotations

from typing import cast

from moe_models.base import ModelConfig, TopkMethod
from moe_models.hf_fields import RouterFields, build_config
from moe_models.schema import ObjectReader


def parse_config(keys: ObjectReader) -> ModelConfig:
    """Softmax scores; the best experts of all (`greedy`) or of the best groups (`group_limited_greedy`)."""
    keys.require("scoring_func", "softmax", because="DeepSeek-V2 routes by softmax scores")
    keys.require("norm_topk_prob", False, because="implementations of DeepSeek-V2 disagree about what true means")
    keys.require("num_nextn_predict_layers", 0, because="DeepSeek-V2 has no multi-token-prediction layers")
    keys.require("rope_interleave", True, because="transformers' DeepSeek-V2 takes interleaved pairs whatever it says")
    method = cast(TopkMethod, keys.choice("topk_method", ["greedy", "group_limited_greedy"], default="greedy"))
    if method == "greedy":
        # Published V2-Lite says n_group=1, transformers writes null: greedy choice has no groups.
        keys.ignore("n_group", "topk_group")
    router = RouterFields(
        scoring="softmax",
        topk_method=method,
        n_group=1 if method == "greedy" else keys.integer("n_group"),
        topk_group=1 if method == "greedy" else keys.integer("topk_group"),
        norm_topk_prob=False,
    )
    return build_config(keys, family="deepseek_v2", router=router, num_nextn_predict_layers=0)
