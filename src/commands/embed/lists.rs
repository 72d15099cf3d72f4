//! Lists of images: lines of paths or URLs, tables as text (CSV, TSV), and
//! lines of JSON. Each line becomes a row; a line that cannot be read becomes a
//! row with its fault.

use std::borrow::Cow;

use anyhow::Context as _;
use serde_json::{Map, Value};

use super::input::ListedRow;
use super::plan::PlanOptions;
use crate::client::pool::ImageFault;

/// Columns of a list that may hold the paths, in the order of preference.
const PATH_COLUMNS: [&str; 8] = [
    "path",
    "image",
    "file",
    "filename",
    "file_name",
    "image_path",
    "url",
    "image_url",
];
/// Byte order mark, with which some editors begin a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Columns that an error message lists.
const LISTED_MAX: usize = 32;

fn begin(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// Reads a list with one path or URL per line.
pub(super) fn lines(text: &[u8]) -> Vec<ListedRow> {
    let lines = begin(text)
        .split(|&byte| byte == b'\n')
        .map(<[u8]>::trim_ascii);
    lines
        .filter(|line| !line.is_empty())
        .map(|line| row(line, None, std::iter::empty()))
        .collect()
}

/// Makes the row of a line. A line that is not UTF-8 becomes an error.
fn row<'a>(
    name: &[u8],
    id: Option<&[u8]>,
    kept: impl Iterator<Item = Option<&'a [u8]>>,
) -> ListedRow {
    let mut is_text = true;
    let mut text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        is_text &= matches!(text, Cow::Borrowed(_));
        text.into_owned()
    };
    let (name, id) = (text(name), id.map(&mut text));
    let kept = kept.map(|value| value.map(&mut text)).collect();
    let fault = || {
        ImageFault::invalid(
            "this line of the list is not UTF-8; write the list in UTF-8".to_owned(),
        )
    };
    ListedRow {
        name,
        id,
        kept,
        trouble: (!is_text).then(fault),
    }
}

/// Makes rows without a path or URL into errors, which are named by their
/// numbers.
pub(super) fn name_empty_rows(rows: &mut [ListedRow], list: &str) {
    for (number, row) in rows.iter_mut().enumerate() {
        if !row.name.is_empty() {
            continue;
        }
        row.trouble.get_or_insert_with(|| {
            ImageFault::invalid("the row has neither a path nor a URL".to_owned())
        });
        row.name = format!("{list}#{number}");
    }
}

/// Returns the column that holds the paths, with the flag that names it.
fn path_column<'a>(options: &PlanOptions<'a>) -> Option<(&'static str, &'a str)> {
    let urls = options.url_column.map(|name| ("--url-column", name));
    urls.or(options.image_column.map(|name| ("--image-column", name)))
}

/// Columns of a list, by their places or names.
struct ListColumns<T> {
    path: T,
    id: Option<T>,
    keep: Vec<T>,
}

impl<T> ListColumns<T> {
    fn find(
        options: &PlanOptions<'_>,
        place: impl Fn(&str) -> Option<T>,
        names: &[String],
    ) -> anyhow::Result<Self> {
        let listed = || {
            let more = names.len().saturating_sub(LISTED_MAX);
            let shown = names[..names.len() - more].join(", ");
            match more {
                0 => shown,
                more => format!("{shown} and {more} more"),
            }
        };
        let of_flag = |flag: &str, name: &str| {
            place(name).with_context(|| {
                format!(
                    "{flag} {name}: the list has no such column; its columns are {}",
                    listed()
                )
            })
        };
        let path = match path_column(options) {
            Some((flag, name)) => of_flag(flag, name)?,
            None => PATH_COLUMNS
                .iter()
                .find_map(|name| place(name))
                .with_context(|| {
                    format!(
                        "no column is known to hold paths; the list's columns are {}; name one \
                         with --url-column",
                        listed()
                    )
                })?,
        };
        let id = options.id_column.map(|name| of_flag("--id-column", name));
        let keep = options.keep.iter().map(|name| of_flag("--keep", name));
        Ok(Self {
            path,
            id: id.transpose()?,
            keep: keep.collect::<anyhow::Result<_>>()?,
        })
    }
}

/// Reads a table as text, with a header.
pub(super) fn table_rows(
    text: &[u8],
    delimiter: u8,
    options: &PlanOptions<'_>,
) -> anyhow::Result<Vec<ListedRow>> {
    let text = begin(text);
    let reader = |from: usize, has_headers: bool| {
        csv::ReaderBuilder::new()
            .delimiter(delimiter)
            .has_headers(has_headers)
            .flexible(true)
            .from_reader(text.get(from..).unwrap_or_default())
    };
    let mut first = reader(0, true);
    let header = first.headers()?.clone();
    let names: Vec<String> = header.iter().map(str::to_owned).collect();
    let place = |name: &str| header.iter().position(|column| column == name);
    let columns = ListColumns::find(options, place, &names)?;
    let mut rows = Vec::new();
    let mut record = csv::ByteRecord::new();
    // A quote that is not closed swallows the lines after it, so reading begins
    // anew with the next line.
    let (mut rest, mut base) = (first, 0);
    let mut counted = CountedLines::default();
    loop {
        let more = rest.read_byte_record(&mut record)?;
        if !more {
            return Ok(rows);
        }
        let start = base + offset(record.position().map_or(0, csv::Position::byte))?;
        let end = base + offset(rest.position().byte())?;
        let whole = text.get(start..end).unwrap_or_default();
        if has_closed_quotes(whole, delimiter) {
            rows.push(table_row(&record, &columns, names.len(), None));
            continue;
        }
        let start = start + blank(whole);
        let line = text.get(start..).unwrap_or_default();
        let length = line.iter().position(|&byte| byte == b'\n');
        let length = length.map_or(line.len(), |place| place + 1);
        let mut alone = csv::ReaderBuilder::new()
            .delimiter(delimiter)
            .has_headers(false)
            .flexible(true)
            .quoting(false)
            .from_reader(&line[..length]);
        alone.read_byte_record(&mut record)?;
        // Tables with tabs are often written without any quoting.
        let fault = (delimiter != b'\t').then(|| {
            let number = counted.up_to(text, start);
            ImageFault::invalid(format!(
                "line {number} of the list has a quote that is not closed; double the quotes \
                 within a field"
            ))
        });
        rows.push(table_row(&record, &columns, names.len(), fault));
        base = start + length;
        rest = reader(base, false);
    }
}

/// Lines of a text up to a place, each counted once.
#[derive(Default)]
struct CountedLines {
    place: usize,
    lines: usize,
}

impl CountedLines {
    /// Returns the number, from 1, of the line that begins at `place`, which is
    /// after all places asked for before.
    fn up_to(&mut self, text: &[u8], place: usize) -> usize {
        let more = text.get(self.place..place).unwrap_or_default();
        self.lines += more.split(|&byte| byte == b'\n').count().saturating_sub(1);
        self.place = place;
        self.lines + 1
    }
}

fn offset(byte: u64) -> anyhow::Result<usize> {
    usize::try_from(byte).context("the list is too long")
}

/// Number of bytes of the empty lines at the beginning of `text`.
fn blank(text: &[u8]) -> usize {
    let is_end = |byte: &&u8| matches!(**byte, b'\r' | b'\n');
    text.iter().take_while(is_end).count()
}

/// True if each field of a record that begins with a quote ends with one.
fn has_closed_quotes(record: &[u8], delimiter: u8) -> bool {
    if !record.contains(&b'"') {
        return true;
    }
    let mut left = record.get(blank(record)..).unwrap_or_default();
    loop {
        let is_end = |byte: &u8| *byte == delimiter || matches!(byte, b'\r' | b'\n');
        if let Some(quoted) = left.strip_prefix(b"\"") {
            let mut at = 0;
            loop {
                match (quoted.get(at), quoted.get(at + 1)) {
                    (Some(b'"'), Some(b'"')) => at += 2,
                    (Some(b'"'), None) => return true,
                    (Some(b'"'), Some(next)) if is_end(next) => break,
                    (None, _) | (Some(b'"'), Some(_)) => return false,
                    _ => at += 1,
                }
            }
            left = &quoted[at + 1..];
        } else {
            let end = left.iter().position(is_end).unwrap_or(left.len());
            left = &left[end..];
        }
        match left.split_first() {
            Some((byte, rest)) if *byte == delimiter => left = rest,
            _ => return true,
        }
    }
}

fn table_row(
    record: &csv::ByteRecord,
    columns: &ListColumns<usize>,
    n_columns: usize,
    fault: Option<ImageFault>,
) -> ListedRow {
    let field = |place: usize| record.get(place).unwrap_or_default();
    // An empty id is no id.
    let id = columns.id.map(field).filter(|id| !id.is_empty());
    let keep = columns.keep.iter().map(|&place| Some(field(place)));
    let mut row = row(field(columns.path), id, keep);
    if record.len() != n_columns && fault.is_none() {
        row.trouble = Some(ImageFault::invalid(format!(
            "this line of the list has {} fields, and the header has {n_columns}; quote a field \
             that has a delimiter in it",
            record.len()
        )));
    }
    row.trouble = fault.or(row.trouble);
    row
}

/// Reads lines of JSON: objects, whose keys are the columns, or strings, which
/// are paths.
///
/// # Errors
///
/// When no object has a column that the flags ask for.
pub(super) fn json_rows(text: &[u8], options: &PlanOptions<'_>) -> anyhow::Result<Vec<ListedRow>> {
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
            let id = columns.id.as_ref().and_then(|id| json_text(&object, id));
            let keep = columns.keep.iter();
            ListedRow {
                kept: keep.map(|name| json_text(&object, name)).collect(),
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

/// Returns a value of an object as text; `None` if there is none.
fn json_text(object: &Map<String, Value>, name: &str) -> Option<String> {
    match object.get(name)? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        value => Some(value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options<'a>(keep: &'a [String], id_column: Option<&'a str>) -> PlanOptions<'a> {
        PlanOptions {
            part_items: 2,
            keep,
            kind: None,
            image_column: None,
            url_column: None,
            id_column,
            output: "/output",
            began: &[],
        }
    }

    /// Names of rows; those with a fault begin with an exclamation mark.
    fn names(rows: &[ListedRow]) -> String {
        let name = |row: &ListedRow| {
            let mark = if row.trouble.is_some() { "!" } else { "" };
            format!("{mark}{}", row.name)
        };
        rows.iter().map(name).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_line_that_is_no_text_is_a_row_with_its_trouble() {
        let list = lines(b"\xef\xbb\xbfa.png\r\n\n b\xff.png\nc.png");
        assert_eq!(names(&list), "a.png !b\u{fffd}.png c.png");
        let keep = ["label".to_owned()];
        let table = b"path,label\na.png,x\nb\xff.png,y\nc.png,\xff\n";
        let rows = table_rows(table, b',', &options(&keep, None)).unwrap();
        assert_eq!(rows[1].kept, [Some("y".to_owned())]);
        assert_eq!(names(&rows), "a.png !b\u{fffd}.png !c.png");
    }

    #[test]
    fn a_quote_that_is_not_closed_is_a_fault_of_its_line() {
        let keep = ["label".to_owned()];
        let of = |text: &str| {
            let rows = table_rows(text.as_bytes(), b',', &options(&keep, None)).unwrap();
            names(&rows)
        };
        // Up to the end, up to the next quote, in a row, and as the first field.
        assert_eq!(of("path,label\na,\"5 inch\nb,2\nc,3\n"), "!a b c");
        assert_eq!(of("path,label\na,\"5 inch\nb,2\nc,\"6\nd,4"), "!a b !c d");
        assert_eq!(of("path,label\na,\"5\nb,\"6\n\nc,7\n"), "!a !b c");
        assert_eq!(of("path,label\r\n\"a,5\r\nb,6\r\n"), "!\"a b");
        // These are well formed.
        assert_eq!(
            of("path,label\n\"a\",\"5\"\" inch\"\nb,\"x\ny\"\nc,\"\""),
            "a b c"
        );
        assert_eq!(of("path,label\na,5\" b\n"), "a");
        // A line with other fields than the header.
        assert_eq!(of("path,label\na,1,2\nb\nc,3\n"), "!a !b c");
    }

    #[test]
    fn the_line_of_a_fault_is_counted_from_the_first() {
        let text = b"path,label\na,\"x\ny\"\nb,\"5 inch\n";
        let rows = table_rows(text, b',', &options(&[], None)).unwrap();
        let fault = rows[1].trouble.as_ref().unwrap();
        assert!(fault.message.starts_with("line 4 of"), "{}", fault.message);
    }

    #[test]
    fn tabs_need_no_quotes() {
        let keep = ["text".to_owned()];
        let table = b"text\tpath\n\"5 inch\ta.png\n\"b, c\"\tb.png\n";
        let rows = table_rows(table, b'\t', &options(&keep, None)).unwrap();
        assert_eq!(names(&rows), "a.png b.png");
        assert_eq!(rows[0].kept, [Some("\"5 inch".to_owned())]);
        assert_eq!(rows[1].kept, [Some("b, c".to_owned())]);
    }

    #[test]
    fn ids_are_taken_from_their_column() {
        let options = options(&[], Some("key"));
        let rows = table_rows(b"path,key\na.png,k0\nb.png,\n", b',', &options).unwrap();
        assert_eq!(rows[0].id.as_deref(), Some("k0"));
        assert_eq!(rows[1].id, None);
        let missing = table_rows(b"path\na.png\n", b',', &options).err().unwrap();
        let missing = format!("{missing:#}");
        assert!(
            missing.contains("--id-column key: the list has no such"),
            "{missing}"
        );
    }

    #[test]
    fn lines_of_json_are_objects_or_paths() {
        let keep = ["n".to_owned()];
        let options_of = options(&keep, Some("key"));
        let text = b"{\"path\":\"a.png\",\"n\":1,\"key\":7}\n\"b.png\"\n{\"n\":2}\n[1]\n{\n";
        let rows = json_rows(text, &options_of).unwrap();
        // A row without a path keeps what it has.
        assert_eq!(names(&rows), "a.png b.png ! ![1] !{");
        assert_eq!(rows[2].kept, [Some("2".to_owned())]);
        assert_eq!(rows[0].kept, [Some("1".to_owned())]);
        assert_eq!(rows[0].id.as_deref(), Some("7"));
        assert!(rows.iter().all(|row| row.kept.len() == 1));
        let paths = json_rows(b"\"a.png\"\n\"b.png\"", &options(&[], None)).unwrap();
        assert_eq!(names(&paths), "a.png b.png");
        assert!(json_rows(text, &options(&["m".to_owned()], None)).is_err());
    }

    #[test]
    fn a_column_of_urls_is_the_column_of_paths_in_every_list() {
        let keep = ["t".to_owned()];
        let of_urls = PlanOptions {
            url_column: Some("u"),
            ..options(&keep, None)
        };
        let json = "\u{feff}{\"u\": \"http://a/1.png\", \"path\": \"no\", \"t\": \"x\"}\r\n\n\
                    {\"u\": null}\n{\"t\": 2.5, \"u\": \" b.png \"}\n{\"u\": 7, \"t\": {\"a\": []}}\n";
        let mut rows = json_rows(json.as_bytes(), &of_urls).unwrap();
        name_empty_rows(&mut rows, "l.jsonl");
        assert_eq!(names(&rows), "http://a/1.png !l.jsonl#1 b.png !l.jsonl#3");
        let why = |row: &ListedRow| row.trouble.as_ref().unwrap().message.clone();
        assert!(why(&rows[1]).contains("neither a path nor a URL in its column u"));
        assert!(why(&rows[3]).contains("the column u of this line of the list is not text"));
        let kept: Vec<_> = rows.iter().map(|row| row.kept[0].as_deref()).collect();
        assert_eq!(kept, [Some("x"), None, Some("2.5"), Some("{\"a\":[]}")]);
        let table = b"path,u,t\nno,a.png,1\nno,,2\n";
        let mut rows = table_rows(table, b',', &of_urls).unwrap();
        name_empty_rows(&mut rows, "l.csv");
        assert_eq!(names(&rows), "a.png !l.csv#1");
    }

    #[test]
    fn a_column_that_no_line_has_is_refused_by_name() {
        let json = b"{\"a\": \"x\", \"b\": 1}\n{}\n";
        let check = |url_column, keep: &[&str], expected: &str| {
            let keep: Vec<String> = keep.iter().map(|&name| name.to_owned()).collect();
            let of_urls = PlanOptions {
                url_column,
                ..options(&keep, None)
            };
            let error = json_rows(json, &of_urls).err().unwrap();
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        };
        check(
            None,
            &[],
            "no column is known to hold paths; the list's columns are a, b",
        );
        check(
            Some("url"),
            &[],
            "--url-column url: the list has no such column; its columns are a, b",
        );
        check(Some("a"), &["c"], "--keep c: the list has no such column");
    }
}
