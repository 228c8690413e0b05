"""Schemas of all tables, their version, and the check of their columns."""

import pyarrow as pa

VERSION = 4
"""Of the tables and documents of a run folder; 2: licences and families in the catalogue; 3: states of files; 4: downloads."""

BASE_ID = "base"
"""The `adapter_id` of candidate 0: the base model without any adapter."""

CATALOGUE = pa.schema(
    [
        ("adapter_id", pa.string()),
        ("uri", pa.string()),  # local path, s3://..., or hf://org/name@commit
        ("sha256", pa.string()),  # of adapter_model.safetensors, as the Hub shows it
        ("adapter_hash", pa.string()),  # of weights and scaling: equal for equal delta weights
        ("base_model", pa.string()),  # what the adapter says that it was trained on
        ("rank", pa.int32()),  # largest of its modules
        ("alpha", pa.float64()),
        ("use_rslora", pa.bool_()),
        ("target_modules", pa.list_(pa.string())),  # leaf names, e.g. q_proj
        ("bytes", pa.int64()),
        ("license", pa.string()),  # what its model card declares; null: nothing
        ("datasets", pa.list_(pa.string())),  # likewise: what it was trained on
        ("status", pa.string()),  # 'ok' or 'set_aside'
        ("reason", pa.string()),  # why it was set aside
        ("warning", pa.string()),  # what a user should know of a valid one
        ("family", pa.string()),  # the first adapter whose delta weights are these times a number, often itself
        ("state", pa.string()),  # of its files, see `adapters/pool.files_state`; null: that cannot be told
        ("downloads", pa.int64()),  # of the Hub's repository that it is in, in the last month; null: not asked
    ]
)

INSPECTED = pa.schema(
    [
        *CATALOGUE,
        ("sketch", pa.list_(pa.float64())),
        ("figures", pa.list_(pa.float64())),
        ("whole", pa.list_(pa.string())),  # weights of layers that it changes whole, which not every engine can score
    ]
)
"""Catalogue rows before adapters are compared with each other, by what `adapters/spectrum.py` finds in their weights."""

CANDIDATES = pa.schema([CATALOGUE.field(name) for name in ("adapter_id", "uri", "adapter_hash", "state")])
"""What is to be scored; `uri` of the base is null."""

SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),  # sha256 of the token ids and the completion mask, 32 hexadecimal digits
        ("split", pa.string()),  # samples.parquet: search, holdout; data/: train, validation, test
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.bool_())),  # tokens of the answer: what NLLs are over, but for train_nll
        ("learn_mask", pa.list_(pa.bool_())),  # these and the end of the turn: what training learns, and train_nll is over
    ]
)

CHOICE = pa.struct([(name, SAMPLES.field(name).type) for name in ("input_ids", "completion_mask")])
"""A row with one of its choices as its answer; the mask is of this last answer alone."""

TEST = SAMPLES.append(pa.field("choices", pa.list_(CHOICE)))
"""The test split; null: the row has no choices, or nothing asks for them."""

SCORES = pa.schema(
    [
        ("adapter_id", pa.string()),
        ("sample_id", pa.string()),
        ("nll_sum", pa.float64()),  # nats, summed over the completion's tokens
        ("n_tokens", pa.int32()),
        ("n_correct", pa.int32()),  # completion tokens that were the model's first choice; null: the engine does not tell
    ]
)

STORED = SCORES.append(pa.field("adapter_hash", pa.string()))
"""A row of the score store: its key is adapter_hash and sample_id; adapter_id is what the adapter was called at the time."""

SCORING_FAILURES = pa.schema([("adapter_id", pa.string()), ("reason", pa.string())])

LEADERBOARD = pa.schema(
    [
        ("place", pa.int32()),
        ("adapter_id", pa.string()),
        ("nll", pa.float64()),  # nats a completion token, on the search samples
        ("stderr", pa.float64()),
        ("n_samples", pa.int32()),
        ("stopped_after", pa.int32()),  # samples seen when it was dropped; null: it saw all
        ("nll_minus_base", pa.float64()),
        ("nll_minus_base_stderr", pa.float64()),  # of the paired difference
        ("token_accuracy", pa.float64()),  # null: as n_correct, as vLLM's model runner V2 does, which GPUs have
        ("holdout_nll_minus_base", pa.float64()),
    ]
)

COMPARISON = pa.schema(
    [
        ("init", pa.string()),
        ("lr", pa.float64()),
        ("seed", pa.int32()),
        ("step", pa.int32()),
        ("tokens", pa.int64()),  # input tokens trained on so far
        ("seconds", pa.float64()),  # spent in training steps so far, evaluation apart
        ("train_nll", pa.float64()),
        ("eval_nll", pa.float64()),
        ("eval_token_accuracy", pa.float64()),
        ("eval_exact_match", pa.float64()),
    ]
)

ANSWERS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float64()),  # null: not scored yet
    ]
)
"""What some weights answer to each row of the test split, in its order."""

METRIC_ROWS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("seed", pa.int32()),  # of training
        ("prompt", pa.string()),  # the beginning and the end of a long one
        ("reference", pa.string()),
        ("base_answer", pa.string()),  # null: there is no such start
        ("base_score", pa.float64()),
        ("mashup_answer", pa.string()),
        ("mashup_score", pa.float64()),
    ]
)
"""What `compare.metric` found, a row for each row of the test split and each seed."""

SEEN = ("adapters", "data", "base", "settings")
"""What a refresh looks at to find out whether there is anything to do."""

HISTORY = pa.schema(
    [
        ("time", pa.timestamp("ms", tz="UTC")),  # of the end
        ("target", pa.string()),
        ("changed", pa.list_(pa.string())),  # of SEEN, since it last went well; 'new target': it never did
        ("seen", pa.struct([(name, pa.string()) for name in SEEN])),  # digests
        ("candidates", pa.int32()),  # adapters on the leaderboard
        ("adapter_samples", pa.int64()),  # newly scored by the search
        ("verdict", pa.string()),
        ("recipe", pa.string()),
        ("donors", pa.list_(pa.string())),
        ("holdout_nll", pa.float64()),  # of the selection, nats a completion token
        ("base_holdout_nll", pa.float64()),
        ("nll_minus_base", pa.float64()),
        ("outcome", pa.string()),  # published, withdrawn, kept, failed, wrong input
        ("mashup", pa.string()),  # where the published mashup is; null: none is better than the base
        ("reason", pa.string()),  # why it failed
        ("seconds", pa.float64()),
    ]
)
"""A row for each target that a refresh worked on."""


def require(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """The columns of `schema` in its order.

    Raises:
        ValueError: a column is missing; the message names the table, the column and what there is.
    """
    missing = [column for column in schema.names if column not in table.column_names]
    if missing:
        raise ValueError(f"{name}: column {missing[0]!r} is missing; it has {', '.join(table.column_names)}")
    return table.select(schema.names).cast(schema)
