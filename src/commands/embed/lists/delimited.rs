//! Tables as text, with a header: CSV and TSV.

use std::borrow::Cow;

use anyhow::Context as _;

use super::{ListColumns, begin, row};
use crate::client::pool::ImageFault;
use crate::commands::embed::input::ListedRow;
use crate::commands::embed::plan::PlanOptions;

/// Reads a text with this delimiter, whose header is a record among others.
fn reader(text: &[u8], delimiter: u8, quoting: bool) -> csv::Reader<&[u8]> {
    csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .quoting(quoting)
        .from_reader(text)
}

/// Finds the columns that the flags ask for in a header. Returns them with the
/// number of all columns.
fn header_columns(
    header: &csv::ByteRecord,
    options: &PlanOptions<'_>,
) -> anyhow::Result<(ListColumns<usize>, usize)> {
    let header = csv::StringRecord::from_byte_record(header.clone())
        .map_err(|_| anyhow::anyhow!("the header is not UTF-8; write the list in UTF-8"))?;
    let names: Vec<String> = header.iter().map(str::to_owned).collect();
    let place = |name: &str| header.iter().position(|column| column == name);
    Ok((ListColumns::find(options, place, &names)?, names.len()))
}

/// Reads a table with commas (CSV), in which a quoted field may have line ends.
pub(in crate::commands::embed) fn comma_rows(
    text: &[u8],
    options: &PlanOptions<'_>,
) -> anyhow::Result<Vec<ListedRow>> {
    const DELIMITER: u8 = b',';
    let text = begin(text);
    let mut first = reader(text, DELIMITER, true);
    let mut header = csv::ByteRecord::new();
    first.read_byte_record(&mut header)?;
    let (columns, n_columns) = header_columns(&header, options)?;
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
        if has_closed_quotes(whole, DELIMITER) {
            rows.push(table_row(&record, &columns, n_columns, None));
            continue;
        }
        let start = start + blank(whole);
        let line = text.get(start..).unwrap_or_default();
        let length = line.iter().position(|&byte| byte == b'\n');
        let length = length.map_or(line.len(), |place| place + 1);
        reader(&line[..length], DELIMITER, false).read_byte_record(&mut record)?;
        let number = counted.up_to(text, start);
        let fault = ImageFault::invalid(format!(
            "line {number} of the list has a quote that is not closed; double the quotes within a \
             field"
        ));
        rows.push(table_row(&record, &columns, n_columns, Some(fault)));
        base = start + length;
        rest = reader(text.get(base..).unwrap_or_default(), DELIMITER, true);
    }
}

/// Reads a table with tabs (TSV), in which each line is a row. Many programs
/// write such tables without any quoting, so a quote is a mark of quoting only
/// where a field begins and ends with one.
pub(in crate::commands::embed) fn tab_rows(
    text: &[u8],
    options: &PlanOptions<'_>,
) -> anyhow::Result<Vec<ListedRow>> {
    let text = begin(text);
    let mut lines = reader(text, TAB, false);
    let mut record = csv::ByteRecord::new();
    let mut line_of = |record: &mut csv::ByteRecord| -> anyhow::Result<Option<&[u8]>> {
        if !lines.read_byte_record(record)? {
            return Ok(None);
        }
        let start = offset(record.position().map_or(0, csv::Position::byte))?;
        let end = offset(lines.position().byte())?;
        Ok(Some(text.get(start..end).unwrap_or_default()))
    };
    let header_line = line_of(&mut record)?.unwrap_or_default();
    // Nothing tells how many columns a header has but its own quotes.
    let header = quoted(header_line)?.unwrap_or_else(|| unquoted(&record));
    let (columns, n_columns) = header_columns(&header, options)?;
    let mut rows = Vec::new();
    while let Some(line) = line_of(&mut record)? {
        // A tab within quotes is recognized by the number of fields.
        let fitting = if record.len() == n_columns {
            None
        } else {
            quoted(line)?.filter(|fields| fields.len() == n_columns)
        };
        let fields = fitting.unwrap_or_else(|| unquoted(&record));
        rows.push(table_row(&fields, &columns, n_columns, None));
    }
    Ok(rows)
}

const TAB: u8 = b'\t';

/// Returns the fields of a line with tabs as its quotes divide it; `None` if a
/// quote is not closed.
fn quoted(line: &[u8]) -> anyhow::Result<Option<csv::ByteRecord>> {
    if !line.contains(&b'"') || !has_closed_quotes(line, TAB) {
        return Ok(None);
    }
    let mut record = csv::ByteRecord::new();
    reader(line, TAB, true).read_byte_record(&mut record)?;
    Ok(Some(record))
}

/// Removes the quotes around each field that begins and ends with one; doubled
/// quotes in it become one.
fn unquoted(record: &csv::ByteRecord) -> csv::ByteRecord {
    let within = |field: &[u8]| -> Option<Vec<u8>> {
        let mut left = field.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        let mut text = Vec::with_capacity(left.len());
        while let Some((&byte, rest)) = left.split_first() {
            text.push(byte);
            left = match byte {
                b'"' => rest.strip_prefix(b"\"").unwrap_or(rest),
                _ => rest,
            };
        }
        Some(text)
    };
    let fields = record.iter();
    fields
        .map(|field| within(field).map_or(Cow::Borrowed(field), Cow::Owned))
        .collect()
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
