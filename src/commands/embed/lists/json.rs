//! Lines of JSON.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{ListColumns, begin, path_column, row};
use crate::client::pool::ImageFault;
use crate::commands::embed::input::ListedRow;
use crate::commands::embed::plan::PlanOptions;

/// Reads lines of JSON: objects, whose keys are the columns, or strings, which
/// are paths.
///
/// # Errors
///
/// When no object has a column that the flags ask for.
pub(in crate::commands::embed) fn json_rows(
    text: &[u8],
    options: &PlanOptions<'_>,
) -> anyhow::Result<Vec<ListedRow>> {
    let values = begin(text)
        .split(|&byte| byte == b'\n')
        .map(<[u8]>::trim_ascii);
    let values = values.filter(|line| !line.is_empty()).map(parsed);
    let mut names: Vec<String> = Vec::new();
    for object in begin(text).split(|&byte| byte == b'\n').filter_map(|line| {
        match serde_json::from_slice(line) {
            Ok(Value::Object(object)) => Some(object),
            _ => None,
        }
    }) {
        for name in object.keys() {
            if !names.contains(name) && names.len() < COLUMNS_MAX {
                names.push(name.clone());
            }
        }
    }
    let only_paths = names.is_empty() && options.keep.is_empty() && options.id_column.is_none();
    let columns = if only_paths && path_column(options).is_none() {
        None
    } else {
        let place = |name: &str| names.iter().find(|known| *known == name).cloned();
        Some(ListColumns::find(options, place, &names)?)
    };
    Ok(values
        .map(|(line, value)| json_row(line, value, columns.as_ref(), options))
        .collect())
}

/// Columns of lines of JSON that are known by name; more are hardly meant.
const COLUMNS_MAX: usize = 4096;

fn parsed(line: &[u8]) -> (&[u8], Result<Value, serde_json::Error>) {
    (line, serde_json::from_slice(line))
}

fn json_row(
    line: &[u8],
    value: Result<Value, serde_json::Error>,
    columns: Option<&ListColumns<String>>,
    options: &PlanOptions<'_>,
) -> ListedRow {
    let no_values = || options.keep.iter().map(|_| None).collect();
    let faulty = |message: String| ListedRow {
        trouble: Some(ImageFault::invalid(message)),
        kept: no_values(),
        ..row(line, None, std::iter::empty())
    };
    match (value, columns) {
        (Ok(Value::String(name)), _) => ListedRow {
            kept: no_values(),
            ..row(name.as_bytes(), None, std::iter::empty())
        },
        (Ok(Value::Object(object)), Some(columns)) => {
            let (path, trouble) = json_path(&object, &columns.path);
            let values = LineValues {
                line,
                object: &object,
                written: OnceCell::new(),
            };
            let id = columns.id.as_ref().and_then(|id| values.text(id));
            let keep = columns.keep.iter();
            ListedRow {
                kept: keep.map(|name| values.text(name)).collect(),
                id,
                trouble,
                ..row(path.as_bytes(), None, std::iter::empty())
            }
        }
        (Ok(_), _) => faulty("this line of the list is neither an object nor a string".to_owned()),
        (Err(error), _) => faulty(format!("this line of the list is not JSON: {error}")),
    }
}

/// Returns the path of an object, which is empty if there is none, and its fault.
fn json_path<'a>(object: &'a Map<String, Value>, name: &str) -> (&'a str, Option<ImageFault>) {
    let fault = match object.get(name) {
        Some(Value::String(path)) if !path.trim().is_empty() => return (path.trim(), None),
        Some(Value::String(_) | Value::Null) | None => {
            format!("this line of the list has neither a path nor a URL in its column {name}")
        }
        Some(_) => format!(
            "the column {name} of this line of the list is not text, and paths and URLs are text"
        ),
    };
    ("", Some(ImageFault::invalid(fault)))
}

/// Values of a line, also as they are written there: a number has more digits in
/// the text than in any type of number.
struct LineValues<'a> {
    line: &'a [u8],
    object: &'a Map<String, Value>,
    /// Texts of the values, which are read once a number asks for them.
    written: OnceCell<BTreeMap<String, &'a RawValue>>,
}

impl LineValues<'_> {
    /// Returns a value as text; `None` if there is none.
    fn text(&self, name: &str) -> Option<String> {
        match self.object.get(name)? {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            value if !has_fraction(value) => Some(value.to_string()),
            value => {
                // The line has been read as values, so it can be read as texts.
                let read = || serde_json::from_slice(self.line).unwrap_or_default();
                let written = self.written.get_or_init(read).get(name);
                let mut text = String::new();
                match written.map(|raw| write_compact(raw, value, &mut text)) {
                    Some(Ok(())) => Some(text),
                    _ => Some(value.to_string()),
                }
            }
        }
    }
}

/// True for a number, or a value with a number in it, whose text may have other
/// digits than its value: every number that is no integer of 64 bits.
fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_fraction),
        Value::Object(values) => values.values().any(has_fraction),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// Writes a value without spaces and with its keys in order, as `value` is
/// written, but with the numbers as they stand in `raw`, the text that `value`
/// was read from. The depth is bounded since reading `value` is.
fn write_compact(raw: &RawValue, value: &Value, text: &mut String) -> serde_json::Result<()> {
    match value {
        Value::Number(_) => text.push_str(raw.get()),
        Value::Array(values) => {
            let raw: Vec<&RawValue> = serde_json::from_str(raw.get())?;
            text.push('[');
            for (place, (raw, value)) in raw.into_iter().zip(values).enumerate() {
                if place > 0 {
                    text.push(',');
                }
                write_compact(raw, value, text)?;
            }
            text.push(']');
        }
        Value::Object(values) => {
            let raw: BTreeMap<String, &RawValue> = serde_json::from_str(raw.get())?;
            text.push('{');
            for (place, (name, value)) in values.iter().enumerate() {
                if place > 0 {
                    text.push(',');
                }
                text.push_str(&serde_json::to_string(name)?);
                text.push(':');
                match raw.get(name) {
                    Some(raw) => write_compact(raw, value, text)?,
                    None => text.push_str(&value.to_string()),
                }
            }
            text.push('}');
        }
        Value::Null | Value::Bool(_) | Value::String(_) => text.push_str(&value.to_string()),
    }
    Ok(())
}
