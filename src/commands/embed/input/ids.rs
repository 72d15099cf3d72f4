//! Ids that a column of a table holds, as text.

use arrow_array::cast::AsArray as _;
use arrow_array::{Array, ArrayRef};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::extension::Uuid;
use arrow_schema::{DataType, Field};

use crate::client::pool::ImageFault;

/// True if each value of the type has one text that everybody would write.
pub(super) fn is_id(kind: &DataType) -> bool {
    match kind {
        DataType::Dictionary(_, values) => is_id(values),
        DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_)
        | DataType::Boolean
        | DataType::Date32
        | DataType::Date64
        | DataType::Time32(_)
        | DataType::Time64(_)
        | DataType::Timestamp(..)
        | DataType::Decimal32(..)
        | DataType::Decimal64(..)
        | DataType::Decimal128(..)
        | DataType::Decimal256(..) => true,
        kind => kind.is_integer() || kind.is_floating(),
    }
}

/// True if version 1 of the manifest took the ids of such a column; it left
/// those of all other types out.
pub(super) fn is_id_of_version_1(kind: &DataType) -> bool {
    kind.is_integer()
        || matches!(
            kind,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
        )
}

/// Returns the id of a row as text; `None` if the row has none.
///
/// # Errors
///
/// The fault of a row whose id is not text.
pub(super) fn id_at(
    field: &Field,
    column: &dyn Array,
    row: usize,
) -> Result<Option<String>, ImageFault> {
    // One row at a time: a column of a dictionary's values may be as many times
    // larger than the dictionary as it has rows.
    let mut one: ArrayRef = column.slice(row, 1);
    if let DataType::Dictionary(_, values) = column.data_type() {
        one = arrow_cast::cast(&one, values).map_err(|error| unfit(field, &error))?;
    }
    // A time of a zone that only a database knows is written in UTC.
    if let DataType::Timestamp(unit, Some(_)) = one.data_type() {
        let utc = DataType::Timestamp(*unit, Some("+00:00".into()));
        one = arrow_cast::cast(&one, &utc).map_err(|error| unfit(field, &error))?;
    }
    if one.is_null(0) {
        return Ok(None);
    }
    let bytes = match one.data_type() {
        DataType::Binary => one.as_binary::<i32>().value(0),
        DataType::LargeBinary => one.as_binary::<i64>().value(0),
        DataType::BinaryView => one.as_binary_view().value(0),
        DataType::FixedSizeBinary(_) => {
            let bytes = one.as_fixed_size_binary().value(0);
            if field.has_valid_extension_type::<Uuid>() {
                return Ok(Some(uuid(bytes)));
            }
            bytes
        }
        _ => {
            let formats = FormatOptions::default();
            let formatter = ArrayFormatter::try_new(&one, &formats);
            let formatter = formatter.map_err(|error| unfit(field, &error))?;
            let text = formatter.value(0).try_to_string();
            return text.map(Some).map_err(|error| unfit(field, &error));
        }
    };
    let text = std::str::from_utf8(bytes);
    text.map(|text| Some(text.to_owned()))
        .map_err(|error| unfit(field, &error))
}

fn unfit(field: &Field, error: &dyn std::fmt::Display) -> ImageFault {
    ImageFault::invalid(format!(
        "id: the value of the column {} ({}) is not text: {error}",
        field.name(),
        field.data_type()
    ))
}

/// Formats 16 bytes as a UUID is usually written.
fn uuid(bytes: &[u8]) -> String {
    let mut text = crate::files::hex(bytes);
    for place in [20, 16, 12, 8] {
        if place < text.len() {
            text.insert(place, '-');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use arrow_array::types::{Int8Type, TimestampMicrosecondType};
    use arrow_array::{
        BinaryArray, BooleanArray, Date32Array, Decimal128Array, DictionaryArray,
        FixedSizeBinaryArray, Float64Array, PrimitiveArray,
    };

    use super::*;

    fn id(column: &dyn Array) -> String {
        let field = Field::new("key", column.data_type().clone(), true);
        assert!(is_id(field.data_type()), "{field}");
        let last = column.len() - 1;
        match id_at(&field, column, last) {
            Ok(id) => id.unwrap_or_else(|| "null".to_owned()),
            Err(fault) => fault.message,
        }
    }

    #[test]
    fn values_are_written_as_everybody_would() {
        let dictionary: DictionaryArray<Int8Type> = vec!["k0", "k1"].into_iter().collect();
        assert_eq!(id(&dictionary), "k1");
        assert_eq!(id(&BinaryArray::from(vec![&b"k2"[..]])), "k2");
        assert_eq!(id(&BooleanArray::from(vec![true])), "true");
        assert_eq!(id(&Float64Array::from(vec![2.5])), "2.5");
        assert_eq!(id(&Date32Array::from(vec![365])), "1971-01-01");
        let decimal = Decimal128Array::from(vec![1234]).with_precision_and_scale(9, 2);
        assert_eq!(id(&decimal.unwrap()), "12.34");
        let time = PrimitiveArray::<TimestampMicrosecondType>::from(vec![1_500_000]);
        let time = time.with_timezone("Europe/Berlin");
        assert_eq!(id(&time), "1970-01-01T00:00:01.500Z");
        assert_eq!(id(&BinaryArray::from(vec![None])), "null");
        let bad = id(&BinaryArray::from(vec![&b"\xff"[..]]));
        assert!(bad.contains("the column key (Binary) is not text"), "{bad}");
        assert!(!is_id(&DataType::Null));
    }

    #[test]
    fn a_uuid_has_its_hyphens() {
        let bytes: Vec<u8> = (0..16).collect();
        let column = FixedSizeBinaryArray::try_from_iter([bytes].into_iter()).unwrap();
        let mut field = Field::new("key", DataType::FixedSizeBinary(16), true);
        field.try_with_extension_type(Uuid).unwrap();
        let id = id_at(&field, &column, 0).unwrap();
        assert_eq!(id.as_deref(), Some("00010203-0405-0607-0809-0a0b0c0d0e0f"));
    }
}
