"""The table of bad inputs of experiments; see bad_inputs.py."""

from kvpitfalls.experiments.config import SweepConfig
from kvpitfalls.experiments.sweep import sweep

EXPERIMENTS = [
    (lambda e: SweepConfig(models="default"), ValueError, "models is 'default'; expected a list that is not empty"),
    (lambda e: SweepConfig(models=[]), ValueError, "models is []; expected a list that is not empty"),
    (lambda e: SweepConfig(models=[3]), TypeError, "models hold 3; expected a str that is not empty"),
    (lambda e: SweepConfig(models=[[]]), TypeError, "models hold []; expected a str that is not empty"),
    (lambda e: SweepConfig(dataset=3), TypeError, "dataset is 3; expected a str that is not empty"),
    (lambda e: SweepConfig(n_prompts=0), ValueError, "n_prompts is 0; expected a whole number, at least 1"),
    (lambda e: SweepConfig(n_prompts=True), ValueError, "n_prompts is True; expected a whole number, at least 1"),
    (lambda e: SweepConfig(n_prompts="x"), ValueError, "n_prompts is 'x'; expected a whole number, at least 1"),
    (lambda e: SweepConfig(batch_size=0), ValueError, "batch_size is 0; expected a whole number, at least 1"),
    (lambda e: SweepConfig(batch_size=None), ValueError, "batch_size is None; expected a whole number, at least 1"),
    (lambda e: SweepConfig(batch_size=1.5), ValueError, "batch_size is 1.5; expected a whole number, at least 1"),
    (lambda e: SweepConfig(seed=-1), ValueError, "seed is -1; expected a whole number, at least 0"),
    (lambda e: SweepConfig(seed="x"), ValueError, "seed is 'x'; expected a whole number, at least 0"),
    (
        lambda e: SweepConfig(policies=["zz"]),
        ValueError,
        "policy is 'zz', which is not known; expected one of adakv, chunkkv, ",
    ),
    (lambda e: SweepConfig(policies=[3]), TypeError, "policy is a int; expected a Policy or one of adakv, chunkkv, "),
    (lambda e: SweepConfig(policies="knorm"), ValueError, "policies is 'knorm'; expected a list that is not empty"),
    (
        lambda e: SweepConfig(modes=["zz"]),
        ValueError,
        "modes hold 'zz'; expected some of biased, fair, paper, random, whitelist, whitelist_defens",
    ),
    (
        lambda e: SweepConfig(modes=[2.0]),
        ValueError,
        "modes hold 2.0; expected some of biased, fair, paper, random, whitelist, whitelist_defense,",
    ),
    (
        lambda e: SweepConfig(modes=[None]),
        ValueError,
        "modes hold None; expected some of biased, fair, paper, random, whitelist, whitelist_defens",
    ),
    (lambda e: SweepConfig(modes=["fair", "fair"]), ValueError, "modes is ['fair', 'fair']; expected each name once"),
    (
        lambda e: SweepConfig(compression_ratios=[1]),
        ValueError,
        "compression_ratio is 1; expected the share removed, a number in [0, 1)",
    ),
    (
        lambda e: SweepConfig(compression_ratios=["x"]),
        ValueError,
        "compression_ratio is 'x'; expected the share removed, a number in [0, ",
    ),
    (
        lambda e: SweepConfig(compression_ratios=0.5),
        ValueError,
        "compression_ratios is 0.5; expected a list that is not empty",
    ),
    (
        lambda e: SweepConfig(orders=["zz"]),
        ValueError,
        "orders hold 'zz'; expected some of defense_first, directive_first",
    ),
    (lambda e: SweepConfig(orders=[[]]), TypeError, "orders hold []; expected a str that is not empty"),
    (
        lambda e: SweepConfig(kinds=["zz"]),
        ValueError,
        "kinds hold 'zz'; expected some of attack, recall, follow, probe, turns",
    ),
    (
        lambda e: SweepConfig(kinds=["turns"]),
        ValueError,
        "kinds hold 'turns', and modes hold 'fair'; expected biased or random",
    ),
    (
        lambda e: SweepConfig(kinds=["turns"], modes=["biased"], policies=["lagkv"]),
        ValueError,
        "kinds hold 'turns', which come in chunks, and policy is 'lagkv', which judges a prompt",
    ),
    (lambda e: SweepConfig(attacks=[]), ValueError, "attacks is []; expected a list that is not empty"),
    (lambda e: SweepConfig(attacks=[3]), TypeError, "attacks hold 3; expected a str that is not empty"),
    (
        lambda e: SweepConfig(defenses=["none"], modes=["whitelist"]),
        ValueError,
        "modes hold whitelist or paper, and defenses 'none'; expe",
    ),
    (
        lambda e: SweepConfig(max_new_tokens={"zz": 3}),
        ValueError,
        "max_new_tokens['zz'] is 3; expected one of attack, recall, follow, pro",
    ),
    (
        lambda e: SweepConfig(max_new_tokens={"attack": 0}),
        ValueError,
        "max_new_tokens['attack'] is 0; expected one of attack, recall, fol",
    ),
    (lambda e: SweepConfig(max_new_tokens=3), TypeError, "max_new_tokens is 3; expected a mapping of kinds to numbers"),
    (lambda e: SweepConfig(device=3), TypeError, "device is 3; expected a str that is not empty"),
    (lambda e: SweepConfig(dtype=3), TypeError, "dtype is 3; expected a str that is not empty"),
    (
        lambda e: SweepConfig(attn_implementation=3),
        TypeError,
        "attn_implementation is 3; expected a str that is not empty",
    ),
    (
        lambda e: SweepConfig.parse({"zz": 1}),
        ValueError,
        "the config holds 'zz'; expected some of models, dataset, n_prompts, defenses, o",
    ),
    (lambda e: SweepConfig.parse([]), TypeError, "the config is a list; expected names and values"),
    (
        lambda e: SweepConfig.parse({3: 1}),
        ValueError,
        "the config holds 3; expected some of models, dataset, n_prompts, defenses, orders,",
    ),
    (lambda e: SweepConfig.read("none.toml"), FileNotFoundError, "[Errno 2] No such file or directory: 'none.toml'"),
    (
        lambda e: sweep(SweepConfig(defenses=["zz"]), "unused"),
        ValueError,
        "defenses hold 'zz'; expected some of none, refuse, confidentia",
    ),
    (
        lambda e: sweep(SweepConfig(attacks=["zz"]), "unused"),
        ValueError,
        "attacks hold 'zz'; expected names such as verbatim-1, or verbat",
    ),
    (
        lambda e: sweep(SweepConfig(n_prompts=10**6), "unused"),
        ValueError,
        "n_prompts is 1000000; expected at most 68, the rows of own",
    ),
    (lambda e: sweep(SweepConfig(), "unused", engine="zz"), ValueError, "engine is 'zz'; expected one of local, ray"),
    (
        lambda e: sweep(SweepConfig(), "unused", workers=2),
        ValueError,
        "workers is 2, with the engine 'local'; expected it with engine='ra",
    ),
    (
        lambda e: sweep(SweepConfig(dataset="~nobody/zz"), "unused"),
        FileNotFoundError,
        "dataset is '~nobody/zz'; expected own, suite-v1, paper, paper_shuff",
    ),
    (lambda e: sweep(None, "unused"), TypeError, "config is a NoneType; expected a SweepConfig"),
]
