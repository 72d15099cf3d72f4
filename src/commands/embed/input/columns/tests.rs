use std::sync::Arc;

use arrow_array::types::Int64Type;
use arrow_array::{ArrayRef, BinaryArray, Int64Array, StringArray, StructArray};
use arrow_schema::Field;

use super::super::tests::{local, read_all, reading};
use super::*;
use crate::commands::embed::plan::{Shard, ShardKind};

/// Makes a table whose images are one byte, the number of their row; row 3 has
/// none.
fn table(n_rows: u8) -> RecordBatch {
    let rows: Vec<[u8; 1]> = (0..n_rows).map(|n| [n]).collect();
    let bytes: BinaryArray = rows
        .iter()
        .map(|row| (row[0] != 3).then_some(&row[..]))
        .collect();
    let path: StringArray = rows.iter().map(|_| None::<&str>).collect();
    let image = StructArray::from(vec![
        (
            Arc::new(Field::new("path", DataType::Utf8, true)),
            Arc::new(path) as ArrayRef,
        ),
        (
            Arc::new(Field::new("bytes", DataType::Binary, true)),
            Arc::new(bytes) as ArrayRef,
        ),
    ]);
    let label: Int64Array = (0..i64::from(n_rows)).map(|n| Some(n * 10)).collect();
    RecordBatch::try_from_iter([
        ("label", Arc::new(label) as ArrayRef),
        ("image", Arc::new(image) as ArrayRef),
    ])
    .unwrap()
}

fn shard(name: &str, content: &[u8]) -> (tempfile::TempDir, Shard) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    let kind = if name == "t.parquet" {
        ShardKind::Parquet(local(&path))
    } else {
        ShardKind::Arrow(local(&path))
    };
    let shard = Shard {
        name: name.to_owned(),
        bytes: content.len() as u64,
        id_base: name.to_owned(),
        kind,
    };
    (dir, shard)
}

fn parquet(batch: &RecordBatch) -> Vec<u8> {
    let properties = parquet::file::properties::WriterProperties::builder()
        .set_max_row_group_row_count(Some(7))
        .build();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.into_inner().unwrap()
}

fn arrow_file(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = arrow_ipc::writer::FileWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(&batch.slice(0, 9)).unwrap();
    writer.write(&batch.slice(9, batch.num_rows() - 9)).unwrap();
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

fn arrow_stream(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(batch).unwrap();
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

/// Rows that no footer names, or that follow the end of a stream, are an error
/// after the rows that can be read.
#[tokio::test]
async fn rows_outside_of_what_an_arrow_file_names_are_an_error() {
    let table = table(20);
    let (whole, stream) = (arrow_file(&table), arrow_stream(&table));
    // A vector of the footer stores its number of blocks, two, just before the
    // first.
    let trailer = whole.len() - 10;
    let length = arrow_ipc::reader::read_footer_length(whole[trailer..].try_into().unwrap());
    let start = trailer - length.unwrap();
    let footer = arrow_ipc::root_as_footer(&whole[start..trailer]).unwrap();
    let blocks = footer.recordBatches().unwrap();
    let first = blocks.get(0);
    let place = start
        + whole[start..trailer]
            .windows(8)
            .position(|bytes| bytes == first.offset().to_le_bytes())
            .unwrap();
    let counted = |count: u32| {
        let mut file = whole.clone();
        assert_eq!(file[place - 4..place], 2_u32.to_le_bytes());
        file[place - 4..place].copy_from_slice(&count.to_le_bytes());
        file
    };
    let named = "the footer names none of the ";
    let after = "the bytes after the end are not read";
    for (name, content, n_rows, reason) in [
        ("t.arrow", counted(0), 0, named),
        ("t.arrow", counted(1), 9, named),
        ("s.arrow", [&stream[..], &stream[..]].concat(), 20, after),
    ] {
        let (_dir, shard) = shard(name, &content);
        let (seen, result) = read_all(shard, 0, reading(&[])).await;
        assert_eq!(seen.len(), n_rows);
        let Err(Broken::Damaged(message)) = result else {
            panic!("{result:?}");
        };
        assert!(message.contains(reason), "{message}");
    }
}

#[tokio::test]
async fn every_row_can_be_begun_at() {
    let table = table(20);
    for (name, content) in [
        ("t.parquet", parquet(&table)),
        ("t.arrow", arrow_file(&table)),
        ("s.arrow", arrow_stream(&table)),
    ] {
        let (_dir, shard) = shard(name, &content);
        for start in [0_u8, 6, 7, 8, 13, 19, 20] {
            let mut reading = reading(&["label"]);
            reading.id_column = Some("label".to_owned());
            let (seen, result) = read_all(shard.clone(), start.into(), reading).await;
            assert!(result.is_ok(), "{result:?}");
            assert_eq!(seen.len(), usize::from(20 - start), "{name} from {start}");
            for (row, (cursor, sample)) in (start..).zip(seen) {
                assert_eq!(cursor, u64::from(row));
                assert_eq!(sample.id, (u32::from(row) * 10).to_string());
                assert_eq!(sample.image.is_ok(), row != 3);
                if let Ok(image) = sample.image {
                    assert_eq!(image, [row][..]);
                }
                let kept = sample.kept.unwrap();
                let label = kept.column(0).as_primitive::<Int64Type>();
                assert_eq!(label.value(0), i64::from(row) * 10);
            }
        }
    }
}

#[tokio::test]
async fn flags_that_do_not_fit_are_told_with_the_columns() {
    let (_dir, shard) = shard("t.parquet", &parquet(&table(3)));
    let (_, result) = read_all(shard, 0, reading(&["caption"])).await;
    let Err(Broken::Unsuited(text)) = result else {
        panic!("{result:?}");
    };
    let expected =
        "--keep caption: the file has no such column; its columns are label (Int64), image (";
    assert!(text.starts_with(expected), "{text}");
}

/// Returns how reading ends, and the number of rows before that.
async fn end_of(name: &str, content: &[u8]) -> (usize, String) {
    let (_dir, shard) = shard(name, content);
    let (seen, result) = read_all(shard, 0, reading(&[])).await;
    let end = match result {
        Ok(()) => "done".to_owned(),
        Err(Broken::Damaged(why)) => format!("damaged: {why}"),
        Err(Broken::OverLimit(why)) => format!("over the limit: {why}"),
        Err(Broken::Unsuited(reason)) => format!("unsuited: {reason}"),
        Err(Broken::Refused(fault)) => format!("refused: {}", fault.message),
        Err(Broken::Failed(error)) => format!("failed: {error:#}"),
    };
    (seen.len(), end)
}

/// Returns `content` with the last occurrence of `old` replaced by `new`.
fn patched(content: &[u8], old: i64, new: i64) -> Vec<u8> {
    let old = old.to_le_bytes();
    let at = content.windows(8).rposition(|bytes| bytes == old).unwrap();
    let mut content = content.to_vec();
    content[at..at + 8].copy_from_slice(&new.to_le_bytes());
    content
}

#[tokio::test]
async fn an_arrow_file_whose_blocks_lie_is_damaged() {
    let content = arrow_file(&table(20));
    let trailer = content.len() - 10;
    let length = content[trailer..].try_into().unwrap();
    let length = arrow_ipc::reader::read_footer_length(length).unwrap();
    let footer = arrow_ipc::root_as_footer(&content[trailer - length..trailer]).unwrap();
    let last = footer.recordBatches().unwrap().get(1);
    for (old, news) in [
        (last.bodyLength(), [-8, i64::MIN, i64::MAX, 1 << 45]),
        (last.offset(), [-8, i64::MIN, i64::MAX, 1 << 45]),
    ] {
        for new in news {
            let (rows, end) = end_of("t.arrow", &patched(&content, old, new)).await;
            assert_eq!(rows, 9, "{end}");
            assert!(end.starts_with("damaged: a message claims"), "{end}");
        }
    }
    let mut long = content.clone();
    long[trailer..trailer + 4].copy_from_slice(&i32::MAX.to_le_bytes());
    let (_, end) = end_of("t.arrow", &long).await;
    assert!(end.starts_with("damaged: the footer claims"), "{end}");
}

#[tokio::test]
async fn a_compressed_buffer_that_claims_too_much_is_not_decompressed() {
    use arrow_ipc::CompressionType;
    use arrow_ipc::writer::{IpcWriteOptions, StreamWriter};

    let value = vec![0_u8; 100_003];
    let bytes: ArrayRef = Arc::new(BinaryArray::from_vec(vec![&value[..]]));
    let batch = RecordBatch::try_from_iter([("image", bytes)]).unwrap();
    for kind in [CompressionType::LZ4_FRAME, CompressionType::ZSTD] {
        let options = IpcWriteOptions::default().try_with_compression(Some(kind));
        let schema = batch.schema();
        let writer = StreamWriter::try_new_with_options(Vec::new(), &schema, options.unwrap());
        let mut writer = writer.unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let content = writer.into_inner().unwrap();
        assert_eq!(end_of("s.arrow", &content).await, (1, "done".to_owned()));
        for claim in [1 << 45, i64::MAX, 17 << 20] {
            let content = patched(&content, 100_003, claim);
            let (rows, end) = end_of("s.arrow", &content).await;
            assert_eq!(rows, 0);
            assert!(
                end.starts_with("over the limit: ") && end.contains("(--image-memory)"),
                "{end}"
            );
        }
        for claim in [-2, i64::MIN, 100_002] {
            let content = patched(&content, 100_003, claim);
            let (_, end) = end_of("s.arrow", &content).await;
            assert!(end.starts_with("damaged: "), "{claim}: {end}");
        }
    }
}

#[tokio::test]
async fn a_page_that_becomes_too_large_is_an_error_that_says_so() {
    use parquet::basic::{Compression, GzipLevel, ZstdLevel};

    let value = vec![0_u8; 20 << 20];
    let bytes: ArrayRef = Arc::new(BinaryArray::from_vec(vec![&value[..]; 2]));
    let batch = RecordBatch::try_from_iter([("image", bytes)]).unwrap();
    for compression in [
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        for has_dictionary in [false, true] {
            let properties = parquet::file::properties::WriterProperties::builder()
                .set_compression(compression)
                .set_dictionary_enabled(has_dictionary)
                .build();
            let writer =
                parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties));
            let mut writer = writer.unwrap();
            writer.write(&batch).unwrap();
            let (rows, end) = end_of("t.parquet", &writer.into_inner().unwrap()).await;
            assert_eq!(rows, 0);
            assert!(
                end.starts_with("over the limit: ") && end.contains("(--image-memory)"),
                "{end}"
            );
        }
    }
}

/// A column without values has a dictionary of no bytes, so that its first
/// page's header begins where the dictionary does.
#[tokio::test]
async fn a_column_without_values_is_kept() {
    let mut columns: Vec<(&str, ArrayRef)> = Vec::new();
    let table = table(20);
    for name in ["label", "image"] {
        columns.push((name, Arc::clone(table.column_by_name(name).unwrap())));
    }
    columns.push(("note", Arc::new(StringArray::new_null(20))));
    columns.push(("count", Arc::new(Int64Array::new_null(20))));
    let table = RecordBatch::try_from_iter_with_nullable(
        columns
            .into_iter()
            .map(|(name, column)| (name, column, true)),
    )
    .unwrap();
    let (_dir, shard) = shard("t.parquet", &parquet(&table));
    for start in [0_u8, 7, 13] {
        let reading = reading(&["note", "count", "label"]);
        let (seen, result) = read_all(shard.clone(), start.into(), reading).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(seen.len(), usize::from(20 - start));
        let kept = seen[0].1.kept.as_ref().unwrap();
        assert!(kept.column(0).is_null(0) && kept.column(1).is_null(0));
        assert!(kept.column(2).is_valid(0));
    }
}

#[tokio::test]
async fn a_table_of_paths_can_be_begun_at_every_row() {
    let names = (0..20).map(|n| (n != 3).then(|| format!("{n}.png")));
    let table = RecordBatch::try_from_iter_with_nullable([(
        "url",
        Arc::new(names.collect::<StringArray>()) as ArrayRef,
        true,
    )])
    .unwrap();
    for (name, content) in [
        ("t.parquet", parquet(&table)),
        ("t.arrow", arrow_file(&table)),
    ] {
        let (dir, shard) = shard(name, &content);
        for n in 0..20_u8 {
            std::fs::write(dir.path().join(format!("{n}.png")), [n]).unwrap();
        }
        for start in [0_u8, 3, 4, 7, 13, 20] {
            let mut reading = reading(&[]);
            reading.url_column = Some("url".to_owned());
            let (seen, result) = read_all(shard.clone(), start.into(), reading).await;
            assert!(result.is_ok(), "{result:?}");
            assert_eq!(seen.len(), usize::from(20 - start), "{name} from {start}");
            for (row, (cursor, sample)) in (start..).zip(seen) {
                assert_eq!(cursor, u64::from(row));
                match sample.image {
                    Ok(image) => assert_eq!(image, [row][..]),
                    Err(fault) => {
                        assert_eq!(row, 3);
                        assert!(fault.message.contains("the row has no URL"));
                    }
                }
            }
        }
    }
}
