//! Lists of images: lines of paths or URLs, tables as text (CSV, TSV), and
//! lines of JSON. Each line becomes a row; a line that cannot be read becomes a
//! row with its fault.

mod delimited;
mod json;

use std::borrow::Cow;

use anyhow::Context as _;

use super::input::ListedRow;
use super::plan::PlanOptions;
use crate::client::pool::ImageFault;

pub(super) use self::delimited::{comma_rows, tab_rows};
pub(super) use self::json::json_rows;

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

#[cfg(test)]
mod tests;
