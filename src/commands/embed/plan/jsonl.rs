//! Lists of images in JSON Lines: one object per line, with the path or URL in
//! one of its fields.

use std::collections::BTreeSet;

use anyhow::Context as _;
use serde_json::{Map, Value};

use super::{BYTE_ORDER_MARK, ListedRow, PATH_COLUMNS, PlanOptions, path_column};
use crate::client::pool::ImageFault;

/// Fields that an error message lists.
const LISTED_MAX: usize = 32;

/// Parses a list. A line that is no object becomes a row with its trouble.
pub(super) fn rows(text: &[u8], options: &PlanOptions<'_>) -> anyhow::Result<Vec<ListedRow>> {
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    let lines = text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let lines = lines.filter(|line| !line.is_empty());
    let mut path = path_column(options).map(|(_, name)| name.to_owned());
    let mut first: Option<Map<String, Value>> = None;
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut has_path = false;
    let mut rows = Vec::new();
    for line in lines {
        let fields = match serde_json::from_slice(line) {
            Ok(Value::Object(fields)) => fields,
            Ok(_) => {
                rows.push(faulty(
                    "this line of the list is not a JSON object".to_owned(),
                    options,
                ));
                continue;
            }
            Err(error) => {
                rows.push(faulty(
                    format!("this line of the list is not JSON: {error}"),
                    options,
                ));
                continue;
            }
        };
        if path.is_none() {
            path = Some(guess(&fields)?);
        }
        let path = path.as_deref().unwrap_or_default();
        has_path |= fields.contains_key(path);
        let kept = options
            .keep
            .iter()
            .filter(|name| fields.contains_key(*name));
        seen.extend(kept.map(String::as_str));
        rows.push(row(&fields, path, options.keep));
        first.get_or_insert(fields);
    }
    let Some(first) = first else {
        return Ok(rows);
    };
    if let Some((flag, name)) = path_column(options) {
        anyhow::ensure!(
            has_path,
            "{flag} {name}: no line of the list has such a field; {}",
            listed(&first)
        );
    }
    if let Some(name) = options
        .keep
        .iter()
        .find(|name| !seen.contains(name.as_str()))
    {
        anyhow::bail!(
            "--keep {name}: no line of the list has such a field; {}",
            listed(&first)
        );
    }
    Ok(rows)
}

fn listed(fields: &Map<String, Value>) -> String {
    let names: Vec<&str> = fields.keys().map(String::as_str).take(LISTED_MAX).collect();
    format!("the first line's fields are {}", names.join(", "))
}

fn guess(first: &Map<String, Value>) -> anyhow::Result<String> {
    let name = PATH_COLUMNS.iter().find(|name| first.contains_key(**name));
    let name = name.with_context(|| {
        format!(
            "no field is known to hold paths; {}; name one with --url-column",
            listed(first)
        )
    })?;
    Ok((*name).to_owned())
}

fn faulty(message: String, options: &PlanOptions<'_>) -> ListedRow {
    ListedRow {
        name: String::new(),
        kept: vec![String::new(); options.keep.len()],
        trouble: Some(ImageFault::invalid(message)),
    }
}

fn row(fields: &Map<String, Value>, path: &str, keep: &[String]) -> ListedRow {
    let mut trouble = None;
    let name = match fields.get(path) {
        Some(Value::String(name)) => name.trim().to_owned(),
        None | Some(Value::Null) => String::new(),
        Some(_) => {
            let message = format!("the field {path} is not text, and paths and URLs are text");
            trouble = Some(ImageFault::invalid(message));
            String::new()
        }
    };
    let text = |value: Option<&Value>| match value {
        Some(Value::String(text)) => text.clone(),
        None | Some(Value::Null) => String::new(),
        Some(other) => other.to_string(),
    };
    ListedRow {
        name,
        kept: keep.iter().map(|name| text(fields.get(name))).collect(),
        trouble,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, url: Option<&str>, keep: &[&str]) -> anyhow::Result<Vec<ListedRow>> {
        let keep: Vec<String> = keep.iter().map(|&name| name.to_owned()).collect();
        let options = PlanOptions {
            part_items: 2,
            keep: &keep,
            image_column: None,
            url_column: url,
            output: "/output",
            began: &[],
        };
        rows(text.as_bytes(), &options)
    }

    #[test]
    fn each_line_is_a_row_or_an_error() {
        let text = "\u{feff}{\"url\": \"http://a/1.png\", \"n\": 1, \"t\": \"x\"}\r\n\n\
                    {\"url\": null}\n{\"n\": 2.5, \"url\": \" b.png \"}\n[1]\n{\"url\"\n\
                    {\"url\": 7, \"t\": {\"a\": []}}\n";
        let got = read(text, None, &["n", "t"]).unwrap();
        let of = |row: &ListedRow| {
            let trouble = row.trouble.as_ref().map(|fault| fault.message.clone());
            (
                row.name.clone(),
                row.kept.join("|"),
                trouble.unwrap_or_default(),
            )
        };
        let got: Vec<_> = got.iter().map(of).collect();
        assert_eq!(
            got[0],
            ("http://a/1.png".to_owned(), "1|x".to_owned(), String::new())
        );
        assert_eq!(got[1], (String::new(), "|".to_owned(), String::new()));
        assert_eq!(
            got[2],
            ("b.png".to_owned(), "2.5|".to_owned(), String::new())
        );
        assert!(got[3].2.contains("not a JSON object"), "{got:?}");
        assert!(got[4].2.contains("not JSON"), "{got:?}");
        assert!(got[5].2.contains("field url is not text"), "{got:?}");
        assert_eq!(got[5].1, "|{\"a\":[]}");
        assert_eq!(got.len(), 6);
    }

    #[test]
    fn a_field_that_no_line_has_is_refused_by_name() {
        let check = |url: Option<&str>, keep: &[&str], expected: &str| {
            let error = read("{\"a\": \"x\", \"b\": 1}\n{}\n", url, keep).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        };
        check(
            None,
            &[],
            "no field is known to hold paths; the first line's fields are a, b",
        );
        check(
            Some("url"),
            &[],
            "--url-column url: no line of the list has such a field",
        );
        check(
            Some("a"),
            &["c"],
            "--keep c: no line of the list has such a field",
        );
        assert!(read("", None, &["c"]).unwrap().is_empty());
    }
}
