//! What `--json` prints is what docs/schema.json says: every test that reads a line reads it through here.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::{Value, json};

const SCHEMA: &str = include_str!("../../../../docs/schema.json");

/// What a line may be, by command; `error` for what any command says that failed. Stricter than what is published: a key
/// that the schema does not have is a mistake here, and is only new to who reads an older schema.
static COMMANDS: LazyLock<BTreeMap<String, Validator>> = LazyLock::new(|| {
    let mut schema: Value = serde_json::from_str(SCHEMA).unwrap();
    close(&mut schema);
    let options = schema["oneOf"].as_array().unwrap().iter();
    let compile = |option: &Value| {
        let at = option["$ref"].as_str().unwrap();
        let name = at.strip_prefix("#/$defs/").unwrap().replace("%20", " ");
        let one = json!({ "$schema": schema["$schema"], "$ref": at, "$defs": schema["$defs"] });
        (name, jsonschema::validator_for(&one).unwrap())
    };
    options.map(compile).collect()
});

/// Objects have the keys that are listed, and no others.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.values_mut().for_each(close);
            if object.get("type") == Some(&json!("object")) && object.contains_key("properties") {
                object.entry("additionalProperties").or_insert(json!(false));
            }
        }
        Value::Array(all) => all.iter_mut().for_each(close),
        _ => {}
    }
}

/// Whether the schema says what a command prints.
pub(crate) fn knows(command: &str) -> bool {
    COMMANDS.contains_key(command)
}

/// A line of standard output, which has to be what the schema says.
#[track_caller]
pub(crate) fn line(text: &str) -> Value {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in: {text:?}"));
    let command = match value.get("error") {
        Some(_) => "error",
        None => value["command"].as_str().expect("a command"),
    };
    assert!(knows(command), "docs/schema.json has no '{command}': {text}");
    let wrong: Vec<String> = COMMANDS[command]
        .iter_errors(&value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(wrong.is_empty(), "docs/schema.json: {}", wrong.join("\n"));
    value
}
