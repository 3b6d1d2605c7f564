//! Compares a body with a recorded shape.

use std::collections::BTreeSet;

use serde_json::Value;

fn name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    }
}

/// Adds every difference between a recorded shape and a body, by its place.
pub(super) fn shapes(place: &str, recorded: &Value, found: &Value, differences: &mut Vec<String>) {
    let mut differ = |recorded: &str, found: &str| {
        differences.push(format!("{place}: recorded {recorded}, here {found}"));
    };
    match (recorded, found) {
        (Value::Null, Value::Null) => {}
        (Value::Object(recorded), Value::Object(found)) => {
            let keys: BTreeSet<_> = recorded.keys().chain(found.keys()).collect();
            for key in keys {
                let place = format!("{place}.{key}");
                match (recorded.get(key), found.get(key)) {
                    (Some(recorded), Some(found)) => shapes(&place, recorded, found, differences),
                    (Some(_), None) => differences.push(format!("{place}: missing")),
                    (None, _) => differences.push(format!("{place}: not recorded")),
                }
            }
        }
        (Value::Array(recorded), Value::Array(found)) => lists(place, recorded, found, differences),
        (Value::String(shape), found) => match (shape.strip_prefix('='), found) {
            (Some(word), Value::String(found)) if word == found => {}
            (Some(word), Value::String(found)) => differ(word, found),
            (Some(word), found) => differ(word, name(found)),
            (None, found) if shape == name(found) => {}
            (None, found) => differ(shape, name(found)),
        },
        (recorded, found) => differ(name(recorded), name(found)),
    }
}

fn lists(place: &str, recorded: &[Value], found: &[Value], differences: &mut Vec<String>) {
    let words = |list: &[Value]| -> Option<BTreeSet<String>> {
        list.iter().map(|word| word.as_str().map(|word| word.trim_start_matches('=').to_owned())).collect()
    };
    if let (Some(recorded), Some(found)) = (words(recorded), words(found)) {
        if recorded != found {
            differences.push(format!("{place}: recorded {recorded:?}, here {found:?}"));
        }
        return;
    }
    let Some(last) = recorded.last() else {
        if !found.is_empty() {
            differences.push(format!("{place}: recorded empty, here not"));
        }
        return;
    };
    if found.is_empty() {
        differences.push(format!("{place}: recorded entries, here none"));
    }
    let place = format!("{place}[]");
    for (index, found) in found.iter().enumerate() {
        shapes(&place, recorded.get(index).unwrap_or(last), found, differences);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn shapes_are_told_apart() {
        let recorded =
            json!({ "a": "text", "b": ["=X", "=Y"], "c": [{ "d": "null" }], "e": "=Word", "f": "number" });
        let compared = |found: Value| {
            let mut differences = Vec::new();
            shapes("", &recorded, &found, &mut differences);
            differences
        };
        let same = json!({ "a": "z", "b": ["Y", "X"], "c": [{ "d": null }], "e": "Word", "f": 3 });
        assert!(compared(same).is_empty());
        let other = json!({ "a": null, "b": ["X"], "c": [{ "d": 1 }, {}], "e": "word", "g": true });
        let expected = [
            ".a: recorded text, here null",
            ".b: recorded {\"X\", \"Y\"}, here {\"X\"}",
            ".c[].d: recorded null, here number",
            ".c[].d: missing",
            ".e: recorded Word, here word",
            ".f: missing",
            ".g: not recorded",
        ];
        assert_eq!(compared(other), expected);
    }
}
