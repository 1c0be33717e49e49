"""What the host and the page see of each node: schema, help, templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_api.latest import io
from hosted import HOSTS_OWN, NODES

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("schemas.json")

every_node = pytest.mark.parametrize("name", list(NODES))


def described(node) -> dict:
    """The part of a schema that saved workflows and prompts depend on."""
    schema = node.define_schema()
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "inputs": [described_input(entry) for entry in schema.inputs],
        "outputs": [entry.io_type for entry in schema.outputs],
    }


def described_input(entry) -> dict:
    found = {key: getattr(entry, key, None) for key in ("default", "min", "max", "step", "options")}
    if entry.id in HOSTS_OWN:
        del found["options"]
    if isinstance(entry, io.DynamicCombo.Input):
        found["options"] = {option.key: [described_input(inner) for inner in option.inputs] for option in entry.options}
    known = {key: value for key, value in found.items() if value is not None}
    return {"id": entry.id, "type": entry.get_io_type(), **known}


def inputs_of(name) -> list:
    """The inputs of a node, those that belong to a choice too."""
    entries = NODES[name].define_schema().inputs
    choices = [entry for entry in entries if isinstance(entry, io.DynamicCombo.Input)]
    return entries + [inner for entry in choices for option in entry.options for inner in option.inputs]


def test_the_schemas_are_those_of_the_snapshot():
    """A node id or an input that changes breaks saved workflows. Meant? Then delete the snapshot and run again."""
    now = {name: described(node) for name, node in NODES.items()}
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(json.dumps(now, indent=2) + "\n")
        pytest.fail(f"there was no snapshot; {SNAPSHOT.name} was written, look at it and commit it")
    assert now == json.loads(SNAPSHOT.read_text())


@every_node
def test_every_input_says_what_it_does(name):
    schema = NODES[name].define_schema()
    assert name.startswith("Slipstream")
    assert schema.node_id == name
    assert schema.description
    assert all(entry.tooltip for entry in inputs_of(name))


@every_node
def test_every_node_is_in_a_template(name):
    templates = [json.loads(path.read_text()) for path in (ROOT / "workflows").glob("*.json")]
    assert any(node["type"] == name for template in templates for node in template["nodes"])
