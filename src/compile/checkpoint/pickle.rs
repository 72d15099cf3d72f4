//! Reads the pickle of a state dict without running any code of it.
//!
//! A pickle is a program for a stack machine that can call any function of the
//! reader. The machine in this module has no functions: it knows the few names
//! that `torch.save` writes for tensors, and each builds plain data. Every
//! other name or operation is refused by name.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use super::Element;

/// A tensor as the pickle describes it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PickledTensor {
    /// Name of the archive's entry that holds the bytes.
    pub(super) storage: Rc<str>,
    pub(super) element: Element,
    /// Offset of the first element in the storage, in elements.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

#[derive(Debug, Clone)]
enum Value {
    Mark,
    None,
    Bool,
    Int(i64),
    Text(Rc<str>),
    /// A tuple and its depth of nested tuples, which is bounded because values
    /// are dropped by recursion.
    Tuple(Rc<[Value]>, usize),
    /// A list; its items are not needed.
    List,
    Dict(Vec<(Value, Value)>),
    Global(Global),
    Storage(Rc<str>, Element),
    Tensor(Rc<PickledTensor>),
}

#[derive(Debug, Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Element),
}

/// Deepest nesting of tuples; the arguments of a tensor are nested two deep.
const TUPLE_DEPTH_MAX: usize = 8;
/// Largest number of dimensions of a tensor; no weight has more.
const DIMENSIONS_MAX: usize = 8;
/// Largest number of elements of a tensor; no storage has more.
const ELEMENTS_MAX: usize = 1 << 40;
/// Largest number of values on the stack, and of remembered values: a state
/// dict of imagegpt-large has some 10,000 of each. A value takes up to a
/// hundred bytes, so a pickle takes at most 50 MiB, the program's texts
/// included.
const VALUES_MAX: usize = 200_000;

/// Returns a value as part of another value. Nested dicts are not needed and
/// are dropped, since kept dicts could nest and multiply.
fn nested(value: Value) -> Value {
    match value {
        Value::Dict(_) => Value::None,
        other => other,
    }
}

/// Reads the tensors of a state dict, by name.
pub(super) fn state_dict(program: &[u8]) -> Result<BTreeMap<String, PickledTensor>, String> {
    let Value::Dict(items) = Machine::new(program).run()? else {
        return Err("it is not a dict of tensors".to_owned());
    };
    let mut tensors = BTreeMap::new();
    for item in items {
        // Items other than named tensors, for instance counters, are not
        // weights.
        if let (Value::Text(name), Value::Tensor(tensor)) = item {
            tensors.insert(name.to_string(), (*tensor).clone());
        }
    }
    Ok(tensors)
}

struct Machine<'p> {
    rest: &'p [u8],
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
}

impl<'p> Machine<'p> {
    fn new(program: &'p [u8]) -> Self {
        Self {
            rest: program,
            stack: Vec::new(),
            memo: HashMap::new(),
        }
    }

    fn run(mut self) -> Result<Value, String> {
        loop {
            if self.stack.len() > VALUES_MAX || self.memo.len() > VALUES_MAX {
                return Err(format!(
                    "it has more than {VALUES_MAX} values at the same time, the limit of a state \
                     dict"
                ));
            }
            let [operation] = self.take()?;
            match operation {
                b'.' => return self.pop(),
                // PROTO, FRAME: their arguments do not matter here.
                0x80 => drop(self.take::<1>()?),
                0x95 => drop(self.take::<8>()?),
                b'(' => self.stack.push(Value::Mark),
                b'N' => self.stack.push(Value::None),
                0x88 | 0x89 => self.stack.push(Value::Bool),
                b'J' | b'K' | b'M' | 0x8a | b'G' => self.number(operation)?,
                b'X' => {
                    let length = u32::from_le_bytes(self.take()?);
                    self.text(length as usize)?;
                }
                0x8c => {
                    let [length] = self.take()?;
                    self.text(length.into())?;
                }
                b'q' | b'r' | 0x94 | b'h' | b'j' => self.memo(operation)?,
                b'c' | 0x93 | b'Q' | b'R' => self.call(operation)?,
                _ => self.container(operation)?,
            }
        }
    }

    fn number(&mut self, operation: u8) -> Result<(), String> {
        let value = match operation {
            b'J' => i64::from(i32::from_le_bytes(self.take()?)),
            b'K' => i64::from(u8::from_le_bytes(self.take()?)),
            b'M' => i64::from(u16::from_le_bytes(self.take()?)),
            0x8a => self.long()?,
            _ => {
                self.take::<8>()?;
                self.stack.push(Value::None);
                return Ok(());
            }
        };
        self.stack.push(Value::Int(value));
        Ok(())
    }

    fn memo(&mut self, operation: u8) -> Result<(), String> {
        let slot = match operation {
            b'q' | b'h' => u32::from(u8::from_le_bytes(self.take()?)),
            b'r' | b'j' => u32::from_le_bytes(self.take()?),
            _ => u32::try_from(self.memo.len()).map_err(|_| "it remembers too many values")?,
        };
        if matches!(operation, b'h' | b'j') {
            self.recall(slot)
        } else {
            self.remember(slot)
        }
    }

    fn call(&mut self, operation: u8) -> Result<(), String> {
        let value = match operation {
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                Value::Global(global(module, name)?)
            }
            0x93 => {
                let name = self.pop_text()?;
                let module = self.pop_text()?;
                Value::Global(global(&module, &name)?)
            }
            b'Q' => storage(&self.pop()?)?,
            _ => {
                let arguments = self.pop()?;
                let callee = self.pop()?;
                call(&callee, &arguments)?
            }
        };
        self.stack.push(value);
        Ok(())
    }

    fn container(&mut self, operation: u8) -> Result<(), String> {
        match operation {
            b'}' => self.stack.push(Value::Dict(Vec::new())),
            b']' => self.stack.push(Value::List),
            b')' => self.push_tuple(Vec::new())?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items)?;
            }
            0x85..=0x87 => self.tuple(usize::from(operation - 0x84))?,
            // BUILD, APPEND, APPENDS: attributes and list items are dropped.
            b'b' | b'a' => drop(self.pop()?),
            b'e' => drop(self.pop_to_mark()?),
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.dict()?.push((key, nested(value)));
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                let (pairs, []) = items.as_chunks::<2>() else {
                    return Err("it has a key without a value".to_owned());
                };
                let pairs = pairs.iter().cloned();
                let pairs = pairs.map(|[key, value]| (key, nested(value)));
                self.dict()?.extend(pairs);
            }
            other => {
                return Err(format!(
                    "it has the operation 0x{other:02x}, which no state dict needs"
                ));
            }
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self.rest.split_first_chunk().ok_or("it is truncated")?;
        self.rest = rest;
        Ok(*head)
    }

    fn bytes(&mut self, length: usize) -> Result<&'p [u8], String> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or("it is truncated")?;
        self.rest = rest;
        Ok(head)
    }

    fn text(&mut self, length: usize) -> Result<(), String> {
        let bytes = self.bytes(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "it has a name that is not UTF-8")?;
        self.stack.push(Value::Text(text.into()));
        Ok(())
    }

    fn line(&mut self) -> Result<&'p str, String> {
        let length = self.rest.iter().position(|byte| *byte == b'\n');
        let bytes = self.bytes(length.ok_or("it is truncated")?)?;
        self.take::<1>()?;
        std::str::from_utf8(bytes).map_err(|_| "it has a name that is not UTF-8".to_owned())
    }

    /// Reads LONG1, a little-endian integer of any length; sizes have at most 8
    /// bytes, so longer integers are refused.
    fn long(&mut self) -> Result<i64, String> {
        let [length] = self.take()?;
        let bytes = self.bytes(length.into())?;
        if bytes.len() > 8 {
            return Err("it has a number of more than 64 bits".to_owned());
        }
        let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) {
            0xff
        } else {
            0
        };
        let mut wide = [fill; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(wide))
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack
            .pop()
            .ok_or_else(|| "it takes a value from an empty stack".to_owned())
    }

    fn pop_text(&mut self) -> Result<Rc<str>, String> {
        match self.pop()? {
            Value::Text(text) => Ok(text),
            _ => Err("it has a name that is not text".to_owned()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self
            .stack
            .iter()
            .rposition(|value| matches!(value, Value::Mark))
            .ok_or("it takes values up to a mark that does not exist")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn tuple(&mut self, length: usize) -> Result<(), String> {
        let start = self
            .stack
            .len()
            .checked_sub(length)
            .ok_or("it takes more values than are on the stack")?;
        let items = self.stack.split_off(start);
        self.push_tuple(items)
    }

    fn push_tuple(&mut self, items: Vec<Value>) -> Result<(), String> {
        let items: Rc<[Value]> = items.into_iter().map(nested).collect();
        let inner = items.iter().map(|item| match item {
            Value::Tuple(_, depth) => *depth,
            _ => 0,
        });
        let depth = 1 + inner.max().unwrap_or(0);
        if depth > TUPLE_DEPTH_MAX {
            return Err(format!(
                "it has tuples in tuples more than {TUPLE_DEPTH_MAX} deep, the limit of a state \
                 dict"
            ));
        }
        self.stack.push(Value::Tuple(items, depth));
        Ok(())
    }

    fn dict(&mut self) -> Result<&mut Vec<(Value, Value)>, String> {
        match self.stack.last_mut() {
            Some(Value::Dict(items)) => Ok(items),
            _ => Err("it puts an item into something that is not a dict".to_owned()),
        }
    }

    /// Remembers the value on top of the stack. A container is remembered
    /// before it is filled, so it must not be recalled; `torch.save` never does
    /// so.
    fn remember(&mut self, slot: u32) -> Result<(), String> {
        let value = match self
            .stack
            .last()
            .ok_or("it remembers a value of an empty stack")?
        {
            Value::Dict(_) | Value::List => Value::Mark,
            other => other.clone(),
        };
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), String> {
        match self.memo.get(&slot) {
            None => Err("it recalls a value that it never remembered".to_owned()),
            Some(Value::Mark) => Err("it uses a container twice".to_owned()),
            Some(value) => {
                self.stack.push(value.clone());
                Ok(())
            }
        }
    }
}

fn global(module: &str, name: &str) -> Result<Global, String> {
    let global = match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
        ("torch", "DoubleStorage") => Global::Storage(Element::F64),
        ("torch", "FloatStorage") => Global::Storage(Element::F32),
        ("torch", "HalfStorage") => Global::Storage(Element::F16),
        ("torch", "BFloat16Storage") => Global::Storage(Element::Bf16),
        ("torch", "BoolStorage" | "ByteStorage" | "CharStorage") => {
            Global::Storage(Element::Other(1))
        }
        ("torch", "ShortStorage") => Global::Storage(Element::Other(2)),
        ("torch", "IntStorage") => Global::Storage(Element::Other(4)),
        ("torch", "LongStorage") => Global::Storage(Element::Other(8)),
        _ => return Err(format!("it calls {module}.{name}, which is not run")),
    };
    Ok(global)
}

/// Reads the reference to a storage: `("storage", type, key, device, length)`.
fn storage(id: &Value) -> Result<Value, String> {
    if let Value::Tuple(parts, _) = id
        && let [
            Value::Text(kind),
            Value::Global(Global::Storage(element)),
            Value::Text(key),
            ..,
        ] = &**parts
        && &**kind == "storage"
    {
        return Ok(Value::Storage(Rc::clone(key), *element));
    }
    Err("it refers to something that is not a storage".to_owned())
}

fn call(callee: &Value, arguments: &Value) -> Result<Value, String> {
    let (Value::Global(global), Value::Tuple(arguments, _)) = (callee, arguments) else {
        return Err("it calls something that is not a function".to_owned());
    };
    match (global, &**arguments) {
        (Global::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
        (Global::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => Ok(tensor.clone()),
        (
            Global::RebuildTensor,
            [
                Value::Storage(storage, element),
                Value::Int(offset),
                Value::Tuple(shape, _),
                Value::Tuple(strides, _),
                ..,
            ],
        ) => {
            let tensor = PickledTensor {
                storage: Rc::clone(storage),
                element: *element,
                offset: size(*offset)?,
                shape: sizes(shape)?,
                strides: sizes(strides)?,
            };
            check_extent(&tensor)?;
            Ok(Value::Tensor(Rc::new(tensor)))
        }
        _ => Err(format!("it calls {global:?} with unknown arguments")),
    }
}

fn sizes(values: &[Value]) -> Result<Vec<usize>, String> {
    values
        .iter()
        .map(|value| match value {
            Value::Int(value) => size(*value),
            _ => Err("it has a size that is not a number".to_owned()),
        })
        .collect()
}

fn size(value: i64) -> Result<usize, String> {
    usize::try_from(value)
        .ok()
        .filter(|value| *value <= ELEMENTS_MAX)
        .ok_or_else(|| format!("it has a size of {value}; sizes must be 0 to {ELEMENTS_MAX}"))
}

/// Refuses sizes that would overflow later computations.
fn check_extent(tensor: &PickledTensor) -> Result<(), String> {
    let n_dimensions = tensor.shape.len();
    if n_dimensions > DIMENSIONS_MAX || n_dimensions != tensor.strides.len() {
        return Err("it has a tensor with strides that do not fit its shape".to_owned());
    }
    let n_elements = tensor
        .shape
        .iter()
        .try_fold(1_usize, |product, size| product.checked_mul(*size));
    let span: u128 = tensor
        .shape
        .iter()
        .zip(&tensor.strides)
        .map(|(size, stride)| size.saturating_sub(1) as u128 * *stride as u128)
        .sum();
    if n_elements.is_some_and(|n| n <= ELEMENTS_MAX) && span < ELEMENTS_MAX as u128 {
        Ok(())
    } else {
        Err(format!(
            "it has a tensor of the shape {:?}, over the limit of {ELEMENTS_MAX} elements",
            tensor.shape
        ))
    }
}
