//! Columns that are kept, the column of images, and the codecs of pages.

use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::types::{
    Int8Type, Int32Type, TimestampMicrosecondType, TimestampSecondType, UInt8Type,
};
use arrow_array::{
    Array as _, ArrayRef, Date64Array, Decimal128Array, DictionaryArray, Int32Array, Int64Array,
    LargeStringArray, PrimitiveArray, RecordBatch, StringArray, StringViewArray, StructArray,
    Time32SecondArray, Time64MicrosecondArray, UnionArray,
};
use arrow_schema::{DataType, Field, UnionFields};
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::{arrow, case, done, embed, errors, ids, parquet, refused, table, tables, worker};

#[test]
fn a_shard_without_a_kept_column_is_one_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let summary = done(embed(&[case("one_odd_shard")], &at("o"), &worker).args(["--keep", "k"]));
    assert_eq!(summary["rows"], 3);
    let lines = errors(&at("o"));
    assert_eq!(lines.len(), 1, "{lines:?}");
    let (id, (code, message)) = lines.first_key_value().expect("a line");
    assert!(id.ends_with("one_odd_shard/b.parquet"), "{id}");
    assert_eq!(code, "INVALID_ARGUMENT");
    assert!(
        message.contains("--keep k: the file has no such column"),
        "{message}"
    );

    // Without a column of images, with several, and of a type that cannot be
    // kept.
    let number: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let good = table(0..1, &[("k", Arc::clone(&number))]);
    parquet(&at("odd/0.parquet"), std::slice::from_ref(&good), None);
    let none = RecordBatch::try_from_iter([("k", Arc::clone(&number))]).expect("a table");
    parquet(&at("odd/1.parquet"), &[none], None);
    let image = crate::images(0..1);
    let two = [("jpg", Arc::clone(&image)), ("png", image), ("k", number)];
    let two = RecordBatch::try_from_iter(two).expect("a table");
    parquet(&at("odd/2.parquet"), &[two], None);
    done(embed(&[at("odd")], &at("o-odd"), &worker).args(["--keep", "k"]));
    assert_eq!(ids(&at("o-odd")), ["0.parquet#0"]);
    assert_eq!(errors(&at("o-odd")).len(), 2);
}

/// Makes a column of unions of one type.
fn unions(n: usize) -> ArrayRef {
    let fields = UnionFields::try_new([0], [Field::new("n", DataType::Int64, true)]);
    let values: ArrayRef = Arc::new(Int64Array::from_iter_values(0..n.try_into().expect("few")));
    let types = std::iter::repeat_n(0_i8, n).collect();
    let column = UnionArray::try_new(fields.expect("a type"), types, None, vec![values]);
    Arc::new(column.expect("unions"))
}

#[test]
fn a_type_that_cannot_be_written_is_refused_before_any_work() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let output = at("output");
    let words = [
        "--keep u: the column holds",
        "Union",
        "cannot be written into the table",
    ];
    let mut command = embed(&[case("keep_union.arrow")], &output, &worker);
    refused(command.args(["--keep", "u"]), &output, &words);

    arrow(&at("sparse.arrow"), &[table(0..3, &[("u", unions(3))])]);
    let mut command = embed(&[at("sparse.arrow")], &output, &worker);
    refused(command.args(["--keep", "u"]), &output, &words);
    let field = Arc::new(Field::new("inner", unions(1).data_type().clone(), true));
    let nested: ArrayRef = Arc::new(StructArray::from(vec![(field, unions(3))]));
    arrow(&at("nested.arrow"), &[table(0..3, &[("u", nested)])]);
    for format in ["parquet", "npy"] {
        let mut command = embed(&[at("nested.arrow")], &output, &worker);
        refused(
            command.args(["--keep", "u", "--format", format]),
            &output,
            &words,
        );
    }
}

#[test]
fn dictionaries_of_several_row_groups_fit_together() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let input = case("keep_dict_int8_two_row_groups.parquet");
    let summary = done(embed(&[input], &at("o"), &worker).args(["--keep", "cat"]));
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&200.into(), &0.into())
    );
    let kept: Vec<String> = tables(&at("o")).iter().flat_map(texts).collect();
    let distinct: std::collections::BTreeSet<&String> = kept.iter().collect();
    assert!(distinct.len() > 128, "more than a key of 8 bits can count");

    // In batches of an Arrow file, and in a list.
    let batch = |start: u8| -> (RecordBatch, Vec<String>) {
        let words: Vec<String> = (start..start + 100).map(|n| format!("w{n}")).collect();
        let column: DictionaryArray<UInt8Type> = words.iter().map(String::as_str).collect();
        let column: ArrayRef = Arc::new(column);
        (table(start..start + 100, &[("cat", column)]), words)
    };
    let batches = [batch(0), batch(100)];
    parquet(
        &at("u8.parquet"),
        &batches.clone().map(|(batch, _)| batch),
        None,
    );
    done(embed(&[at("u8.parquet")], &at("o-u8"), &worker).args(["--keep", "cat"]));
    let kept: Vec<String> = tables(&at("o-u8")).iter().flat_map(texts).collect();
    let expected: Vec<String> = batches.into_iter().flat_map(|(_, words)| words).collect();
    assert_eq!(kept, expected);

    let lists = |start: i8| {
        let keys = arrow_array::PrimitiveArray::<Int8Type>::from_iter_values(0..100);
        let words: StringArray = (0..100).map(|n| Some(format!("{start}-{n}"))).collect();
        let words = DictionaryArray::new(keys, Arc::new(words));
        let field = Arc::new(Field::new("item", words.data_type().clone(), true));
        let lengths = arrow_buffer::OffsetBuffer::from_lengths([50, 50]);
        let lists = arrow_array::ListArray::new(field, lengths, Arc::new(words), None);
        let column: ArrayRef = Arc::new(lists);
        let start = u8::try_from(start).expect("few");
        table(2 * start..2 * start + 2, &[("cat", column)])
    };
    parquet(&at("l.parquet"), &[lists(0), lists(1)], None);
    done(embed(&[at("l.parquet")], &at("o-l"), &worker).args(["--keep", "cat"]));
    let rows: usize = tables(&at("o-l")).iter().map(RecordBatch::num_rows).sum();
    assert_eq!(rows, 4);
}

/// Returns the texts of the last column, a dictionary.
fn texts(table: &RecordBatch) -> Vec<String> {
    let column = table.columns().last().expect("a column");
    let column = column.as_dictionary::<Int32Type>();
    let values = column.downcast_dict::<StringArray>().expect("texts");
    let texts = values
        .into_iter()
        .map(|text| text.expect("a text").to_owned());
    texts.collect()
}

#[test]
fn kept_columns_keep_their_types() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let day = 24 * 60 * 60 * 1000;
    let input = case("keep_date64.parquet");
    done(embed(&[input], &at("o"), &worker).args(["--keep", "d"]));
    let kept = tables(&at("o"));
    let kept = kept[0].column_by_name("d").expect("the column");
    assert_eq!(kept.data_type(), &DataType::Date64);
    // A reader that knows no Arrow finds dates, too.
    let file = std::fs::File::open(at("o/part-00000-00000.parquet")).expect("a file");
    let reader = parquet::file::reader::SerializedFileReader::new(file).expect("Parquet");
    let metadata = parquet::file::reader::FileReader::metadata(&reader);
    let schema = metadata.file_metadata().schema_descr();
    let column = schema.column(schema.num_columns() - 1);
    assert_eq!(
        column.logical_type_ref(),
        Some(&parquet::basic::LogicalType::Date)
    );

    let time = PrimitiveArray::<TimestampMicrosecondType>::from(vec![1, 2]);
    let decimal = Decimal128Array::from(vec![1, 2]).with_precision_and_scale(20, 4);
    let field = Arc::new(Field::new("n", DataType::Int32, true));
    let inner: ArrayRef = Arc::new(Int32Array::from(vec![1, 2]));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("date", Arc::new(Date64Array::from(vec![Some(day), None]))),
        ("zone", Arc::new(time.with_timezone("Europe/Berlin"))),
        ("time", Arc::new(Time64MicrosecondArray::from(vec![1, 2]))),
        ("decimal", Arc::new(decimal.expect("a type"))),
        ("large", Arc::new(LargeStringArray::from(vec!["a", "b"]))),
        ("view", Arc::new(StringViewArray::from(vec!["a", "b"]))),
        ("struct", Arc::new(StructArray::from(vec![(field, inner)]))),
    ];
    let batch = table(0..2, &columns);
    parquet(&at("t.parquet"), std::slice::from_ref(&batch), None);
    arrow(&at("t.arrow"), std::slice::from_ref(&batch));
    let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    let names = names.join(",");
    for input in ["t.parquet", "t.arrow"] {
        let output = at(&format!("o-{input}"));
        done(embed(&[at(input)], &output, &worker).args(["--keep", &names]));
        let kept = tables(&output);
        for (name, column) in &columns {
            let kept = kept[0].column_by_name(name).expect("the column");
            assert_eq!(kept, column, "{input} {name}");
        }
    }
}

#[test]
fn times_in_seconds_are_times_in_parquet() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let times = PrimitiveArray::<TimestampSecondType>::from(vec![Some(-1), None]);
    let inner: ArrayRef = Arc::new(times.clone());
    let field = Arc::new(Field::new("t", inner.data_type().clone(), true));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("t", Arc::clone(&inner)),
        ("zone", Arc::new(times.with_timezone("+01:00"))),
        ("day", Arc::new(Time32SecondArray::from(vec![86_399, 0]))),
        ("inner", Arc::new(StructArray::from(vec![(field, inner)]))),
    ];
    arrow(&at("t.arrow"), &[table(0..2, &columns)]);
    let names = ["--keep", "t,zone,day,inner"];
    done(embed(&[at("t.arrow")], &at("o"), &worker).args(names));
    let kept = &tables(&at("o"))[0];
    for (name, expected) in [
        ("t", "1969-12-31T23:59:59"),
        ("zone", "1970-01-01T00:59:59+01:00"),
        ("day", "23:59:59"),
        ("inner", "{t: 1969-12-31T23:59:59}"),
    ] {
        let column = kept.column_by_name(name).expect("the column");
        let text = arrow_cast::display::array_value_to_string(column, 0);
        assert_eq!(text.expect("a text"), expected);
    }
    // A reader that knows no Arrow finds times, too.
    let file = std::fs::File::open(at("o/part-00000-00000.parquet")).expect("a file");
    let reader = parquet::file::reader::SerializedFileReader::new(file).expect("Parquet");
    let metadata = parquet::file::reader::FileReader::metadata(&reader);
    let schema = metadata.file_metadata().schema_descr();
    let columns = schema.columns().iter();
    let logical = columns.filter_map(|column| column.logical_type_ref());
    let times = logical.filter(|logical| format!("{logical:?}").starts_with("Time"));
    assert_eq!(times.count(), 4, "{schema:?}");
    // Arrow has seconds.
    let flags = [names[0], names[1], "--format", "arrow"];
    done(embed(&[at("t.arrow")], &at("o-arrow"), &worker).args(flags));
    let file = std::fs::File::open(at("o-arrow/part-00000-00000.arrow")).expect("a file");
    let reader = arrow_ipc::reader::FileReader::try_new(file, None).expect("Arrow");
    let kind = reader
        .schema()
        .field_with_name("day")
        .expect("the column")
        .data_type()
        .clone();
    assert_eq!(kind, DataType::Time32(arrow_schema::TimeUnit::Second));
    // A time that milliseconds cannot hold is not lost in silence.
    let far: ArrayRef = Arc::new(PrimitiveArray::<TimestampSecondType>::from(vec![
        0,
        i64::MAX,
    ]));
    arrow(&at("far.arrow"), &[table(0..2, &[("t", far)])]);
    done(embed(&[at("far.arrow")], &at("o-far"), &worker).args(["--keep", "t"]));
    let lines = errors(&at("o-far"));
    assert_eq!(lines.len(), 1, "{lines:?}");
}

#[test]
fn a_column_that_is_named_twice_is_refused_before_any_work() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("o");
    for keep in [
        &["--keep", "lab,lab"][..],
        &["--keep", "a,lab", "--keep", "lab"],
    ] {
        // The input is not looked at.
        let mut command = crate::command(&[dir.path().join("nowhere.parquet")], &output);
        refused(
            command.args(keep),
            &output,
            &["--keep lab: the column is named twice"],
        );
    }
}

#[test]
fn pages_of_every_codec_are_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let output = dir.path().join("o");
    let summary = done(&mut embed(&[case("brotli.parquet")], &output, &worker));
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&3.into(), &0.into())
    );
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
    ];
    let folder = dir.path().join("codecs");
    for (n, codec) in codecs.into_iter().enumerate() {
        let properties = WriterProperties::builder().set_compression(codec).build();
        let file = folder.join(format!("{n}.parquet"));
        parquet(&file, &[table(0..3, &[])], Some(properties));
    }
    let output = dir.path().join("o-codecs");
    let summary = done(&mut embed(&[folder], &output, &worker));
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&21.into(), &0.into())
    );
}

#[test]
fn the_column_of_images_is_the_one_with_that_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    let input = case("guess_audio_before_image.parquet");
    let summary = done(&mut embed(&[input], &at("o"), &worker));
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&3.into(), &0.into())
    );

    let sound: ArrayRef = Arc::new(arrow_array::BinaryArray::from(vec![&b"RIFF"[..]]));
    let field = Arc::new(Field::new("bytes", DataType::Binary, true));
    let sound: ArrayRef = Arc::new(StructArray::from(vec![(field, sound)]));
    for (name, image) in [("img", "img"), ("upper", "Image"), ("photo", "png")] {
        let columns = [("audio", Arc::clone(&sound)), (image, crate::images(0..1))];
        let batch = RecordBatch::try_from_iter(columns).expect("a table");
        let input = at(&format!("{name}.parquet"));
        parquet(&input, &[batch], None);
        let summary = done(&mut embed(&[input], &at(&format!("o-{name}")), &worker));
        assert_eq!(summary["rows"], 1, "{name}");
    }
    let columns = [("jpg", crate::images(0..1)), ("png", crate::images(0..1))];
    let batch = RecordBatch::try_from_iter(columns).expect("a table");
    parquet(&at("two.parquet"), &[batch], None);
    let output = at("o-two");
    let words = ["several columns may hold images"];
    refused(
        &mut embed(&[at("two.parquet")], &output, &worker),
        &output,
        &words,
    );
}
