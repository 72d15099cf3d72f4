//! The embedding and the layers that the graphs of all tasks share.

use super::builder::Builder;
use crate::compile::store::{PARTS, block_size};
use crate::kernels::layers::Activation;
use crate::model::onnx::{AttributeProto, DataType, Dim, IMAGEGPT, MICROSOFT, ValueInfoProto};
use crate::model::precision::{Precision, Provider};
use crate::runtime::operators::{QUICK_GELU_BF16, QUICK_GELU_FACTOR, QUICK_GELU_FP16};

/// Names of the input of token ids and of the shapes that follow from it.
pub(super) struct TokenInputs {
    pub(super) ids: String,
    /// Tensor `[batch, sequence]`, whose values are known when the graph runs.
    pub(super) shape: String,
    /// Tensor `[sequence]`.
    pub(super) sequence: String,
}

/// Residual stream: its rows, and possibly an addend that is not added yet.
pub(super) struct ResidualStream {
    rows: String,
    addend: Option<String>,
}

impl ResidualStream {
    pub(super) fn new(rows: String) -> Self {
        Self { rows, addend: None }
    }
}

/// Content of the output of an operator of all layers of whole images.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum LayersOutput {
    /// Rows after the last layer.
    Rows,
    /// Means over positions of the normed stream, in front of each layer and
    /// after the last.
    NormedMeans,
    /// Means over positions of the stream itself.
    RawMeans,
}

impl LayersOutput {
    fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::NormedMeans => "normed_means",
            Self::RawMeans => "raw_means",
        }
    }
}

/// Other rows in the batch of a row: the same in every run, or changing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Company {
    Fixed,
    Changing,
}

/// Names of the inputs that describe the length of the key/value cache.
pub(super) struct CacheInputs {
    pub(super) seqlens_k: String,
    pub(super) total_sequence_length: String,
}

impl Builder<'_> {
    pub(super) fn tokens(&mut self) -> TokenInputs {
        let dims = [Dim::Name("batch"), Dim::Name("sequence")];
        let ids = self.input(ValueInfoProto::tensor("input_ids", DataType::Int32, &dims));
        let shape = self.standard("Shape", &[&ids], Vec::new());
        let from = vec![AttributeProto::int("start", 1)];
        let sequence = self.standard("Shape", &[&ids], from);
        TokenInputs {
            ids,
            shape,
            sequence,
        }
    }

    /// Returns embedded tokens at the positions 0, 1, 2 and so on, `(batch,
    /// sequence, width)`.
    pub(super) fn embedded(&mut self, tokens: &TokenInputs) -> String {
        let table = self.weight("wpe");
        let zero = self.int64s("zero", &[0]);
        let positions = self.standard("Slice", &[&table, &zero, &tokens.sequence, &zero], vec![]);
        self.embedded_at(tokens, &positions)
    }

    /// Returns embedded tokens plus embedded `positions`.
    pub(super) fn embedded_at(&mut self, tokens: &TokenInputs, positions: &str) -> String {
        let table = self.weight("wte");
        let embedded = self.standard("Gather", &[&table, &tokens.ids], Vec::new());
        self.standard("Add", &[&embedded, positions], Vec::new())
    }

    /// Reshapes `(batch, sequence, width)` to `(batch * sequence, width)`.
    pub(super) fn rows(&mut self, value: &str) -> String {
        let width = as_i64(self.plan.architecture.width);
        let shape = self.int64s("rows", &[-1, width]);
        self.standard("Reshape", &[value, &shape], Vec::new())
    }

    /// Reshapes rows of `width` to `(batch, sequence, width)`.
    pub(super) fn sequences(&mut self, tokens: &TokenInputs, rows: &str, width: usize) -> String {
        let last = self.int64s(&format!("width.{width}"), &[as_i64(width)]);
        let axis = vec![AttributeProto::int("axis", 0)];
        let shape = self.standard("Concat", &[&tokens.shape, &last], axis);
        self.standard("Reshape", &[rows, &shape], Vec::new())
    }

    /// Adds the pending addend to the stream and computes the RMS norm of each
    /// row.
    pub(super) fn norm(&mut self, stream: &mut ResidualStream, weight: &str) -> String {
        let weight = self.weight(weight);
        let epsilon = AttributeProto::float("epsilon", self.plan.architecture.epsilon);
        let Some(addend) = stream.addend.take() else {
            let attributes = vec![
                AttributeProto::int("axis", -1),
                epsilon,
                AttributeProto::int("stash_type", i32::from(DataType::Float).into()),
            ];
            let inputs = [&*stream.rows, &*weight];
            return self.standard("SimplifiedLayerNormalization", &inputs, attributes);
        };
        let operator = "SkipSimplifiedLayerNormalization";
        let normed = self.fresh(operator);
        let sum = format!("{normed}.sum");
        let inputs = [&*addend, &*stream.rows, &*weight];
        let outputs = [normed.clone(), String::new(), String::new(), sum.clone()].into();
        self.push(operator, MICROSOFT, &inputs, outputs, vec![epsilon]);
        stream.rows = sum;
        normed
    }

    /// Returns the rows of the stream, with the pending addend added.
    pub(super) fn settled(&mut self, stream: &mut ResidualStream) -> String {
        if let Some(addend) = stream.addend.take() {
            stream.rows = self.standard("Add", &[&addend, &stream.rows], Vec::new());
        }
        stream.rows.clone()
    }

    /// Adds `x W` to the stream. A GPU adds in the norm that follows, which
    /// reads both anyway; a CPU adds in the product.
    fn add_dense(
        &mut self,
        stream: &mut ResidualStream,
        input: &str,
        name: &str,
        company: Company,
    ) {
        if self.plan.provider == Provider::Cuda {
            stream.addend = Some(self.dense(input, name, None, company));
        } else {
            let rows = self.settled(stream);
            stream.rows = self.dense(input, name, Some(&rows), company);
        }
    }

    /// Adds layer `idx`; `normed` is the stream after the norm in front of it.
    pub(super) fn layer(
        &mut self,
        idx: usize,
        tokens: &TokenInputs,
        stream: &mut ResidualStream,
        normed: &str,
        cache: Option<&CacheInputs>,
    ) {
        let width = self.plan.architecture.width;
        self.scope = format!("h.{idx}");
        let name = |part: &str| format!("h.{idx}.{part}");
        // With a cache, the other rows change from step to step.
        let company = if cache.is_some() {
            Company::Changing
        } else {
            Company::Fixed
        };
        let attended = if self.plan.is_apart() && cache.is_none() {
            let parts = PARTS.map(|part| {
                let part = self.dense(normed, &name(part), None, company);
                self.sequences(tokens, &part, width)
            });
            self.attention_apart(idx, &parts)
        } else {
            let qkv = self.dense(normed, &name("qkv"), None, company);
            let qkv = self.sequences(tokens, &qkv, 3 * width);
            self.attention(idx, &qkv, cache)
        };
        let attended = self.rows(&attended);
        self.add_dense(stream, &attended, &name("projection"), company);
        let normed = self.norm(stream, &name("inner_norm"));
        let inner = self.dense(&normed, &name("expand"), None, company);
        let inner = self.activation(&inner);
        self.add_dense(stream, &inner, &name("contract"), company);
    }

    /// Computes `x W + b + residual`.
    fn dense(
        &mut self,
        input: &str,
        name: &str,
        residual: Option<&str>,
        company: Company,
    ) -> String {
        let bias_name = format!("{name}.bias");
        let has_bias = self.plan.store.contains(&bias_name);
        let bias = has_bias.then(|| self.weight(&bias_name));
        if self.plan.precision == Precision::Int8 && company == Company::Changing {
            let product = self.by_row(input, name);
            return [bias.as_deref(), residual]
                .into_iter()
                .flatten()
                .fold(product, |sum, addend| {
                    self.standard("Add", &[&sum, addend], Vec::new())
                });
        }
        let weight = self.weight(name);
        if self.plan.precision == Precision::Int8 {
            let scale = self.weight(&format!("{name}.scale"));
            // An absent zero point is zero.
            let mut inputs = vec![input, &weight, &scale];
            if let Some(bias) = &bias {
                inputs.extend(["", bias]);
            }
            let product = self.fused("DynamicQuantizeMatMul", &inputs, Vec::new());
            return match residual {
                Some(residual) => self.standard("Add", &[&product, residual], Vec::new()),
                None => product,
            };
        }
        let mut attributes = Vec::new();
        if self.plan.is_apart() && name.contains(".qkv") {
            attributes.push(AttributeProto::int("transB", 1));
        }
        match (bias, residual) {
            (None, None) => self.standard("Gemm", &[input, &weight], attributes),
            (Some(addend), None) => self.standard("Gemm", &[input, &weight, &addend], attributes),
            (None, Some(addend)) => self.standard("Gemm", &[input, &weight, addend], attributes),
            (Some(bias), Some(residual)) => {
                let product = self.standard("Gemm", &[input, &weight, &bias], attributes);
                self.standard("Add", &[&product, residual], Vec::new())
            }
        }
    }

    /// Computes `x W` in 8 bits with a scale per row. The operator that is fast
    /// for whole images has one scale for all rows, so a row's result would
    /// depend on the other rows.
    fn by_row(&mut self, input: &str, name: &str) -> String {
        let blocks = self.weight(&format!("{name}.blocks"));
        let scales = self.weight(&format!("{name}.block_scales"));
        let [outputs, inputs] = self.plan.product(name);
        let attributes = vec![
            AttributeProto::int("K", as_i64(inputs)),
            AttributeProto::int("N", as_i64(outputs)),
            AttributeProto::int("bits", 8),
            AttributeProto::int("block_size", as_i64(block_size(inputs))),
            // Rows are rounded to 8 bits as well.
            AttributeProto::int("accuracy_level", 4),
        ];
        self.fused("MatMulNBits", &[input, &blocks, &scales], attributes)
    }

    fn activation(&mut self, input: &str) -> String {
        match self.plan.architecture.activation {
            Activation::QuickGelu => {
                let own = match (self.plan.provider, self.plan.precision) {
                    (Provider::Cuda, Precision::Fp16) => Some(QUICK_GELU_FP16),
                    (Provider::Cuda, Precision::Bf16) => Some(QUICK_GELU_BF16),
                    _ => None,
                };
                if let Some(operator) = own.filter(|_| self.plan.has_ours) {
                    return self.ours(operator, input);
                }
                let alpha = vec![AttributeProto::float("alpha", QUICK_GELU_FACTOR)];
                self.fused("QuickGelu", &[input], alpha)
            }
            Activation::Gelu => self.fused("Gelu", &[input], Vec::new()),
            Activation::GeluNew => self.fused("FastGelu", &[input], Vec::new()),
            Activation::Relu => self.standard("Relu", &[input], Vec::new()),
        }
    }

    /// Adds one of the worker's own operators.
    fn ours(&mut self, operator: &str, input: &str) -> String {
        let output = self.fresh(operator);
        let outputs = vec![output.clone()];
        self.push(operator, IMAGEGPT, &[input], outputs, Vec::new());
        output
    }

    /// Adds attention, from `(batch, sequence, 3 * width)` to `(batch,
    /// sequence, width)`.
    fn attention(&mut self, idx: usize, qkv: &str, cache: Option<&CacheInputs>) -> String {
        if let Some(cache) = cache {
            let attributes = self.attention_attributes(idx, false);
            return self.cached_attention(idx, qkv, cache, attributes);
        }
        let width = as_i64(self.plan.architecture.width);
        let sizes = self.int64s("qkv_widths", &[width, width, width]);
        let parts = ["query", "key", "value"].map(|part| self.fresh(part));
        let axis = vec![AttributeProto::int("axis", 2)];
        self.push("Split", "", &[qkv, &sizes], parts.to_vec(), axis);
        self.attention_apart(idx, &parts)
    }

    /// Adds attention over separate queries, keys and values, each of the shape
    /// `(batch, sequence, width)`, which is the result's shape too.
    fn attention_apart(&mut self, idx: usize, parts: &[String; 3]) -> String {
        let attributes = self.attention_attributes(idx, true);
        let [query, key, value] = parts;
        self.fused("MultiHeadAttention", &[query, key, value], attributes)
    }

    fn attention_attributes(&self, idx: usize, is_causal: bool) -> Vec<AttributeProto> {
        let architecture = self.plan.architecture;
        #[expect(clippy::cast_possible_truncation, reason = "ONNX attributes are f32")]
        let scale = architecture.attention_scale(idx) as f32;
        let mut attributes = vec![
            AttributeProto::int("num_heads", as_i64(architecture.n_heads)),
            AttributeProto::float("scale", scale),
        ];
        if is_causal {
            attributes.push(AttributeProto::int("unidirectional", 1));
        }
        attributes
    }

    /// Adds attention over a key/value cache that the caller binds as input and
    /// as output: if both are one buffer, keys and values are appended in
    /// place. The operator chooses the order of numbers within a head.
    fn cached_attention(
        &mut self,
        idx: usize,
        qkv: &str,
        cache: &CacheInputs,
        mut attributes: Vec<AttributeProto>,
    ) -> String {
        let [past_key, past_value, key, value] = self.kept(idx);
        let operator = self.plan.attention.operator();
        let output = self.fresh(operator);
        let outputs = vec![output.clone(), key, value];
        let n_heads = as_i64(self.plan.architecture.n_heads);
        attributes.push(AttributeProto::int("kv_num_heads", n_heads));
        let (seqlens_k, total) = (&cache.seqlens_k, &cache.total_sequence_length);
        let inputs = [qkv, "", "", &past_key, &past_value, seqlens_k, total];
        self.push(operator, MICROSOFT, &inputs, outputs, attributes);
        output
    }

    /// Declares a layer's cached keys and values: as inputs before the step,
    /// and as outputs after it.
    fn kept(&mut self, idx: usize) -> [String; 4] {
        let architecture = self.plan.architecture;
        let (element, position_len) = self.plan.cache_position();
        let dims = [
            Dim::Name("batch"),
            Dim::Size(architecture.n_heads),
            Dim::Name("capacity"),
            Dim::Size(position_len),
        ];
        let names = ["past_key", "past_value", "key", "value"].map(|part| format!("{part}.{idx}"));
        for (part, name) in names.iter().enumerate() {
            let info = ValueInfoProto::tensor(name, element, &dims);
            if part < 2 {
                self.input(info);
            } else {
                self.declare_output(info);
            }
        }
        names
    }

    /// Adds all layers as one operator, over a key/value cache as in
    /// `cached_attention`, for sequences that may share prefixes.
    pub(super) fn all_layers(&mut self, rows: &str, cache: &CacheInputs, prefixes: &str) -> String {
        let architecture = self.plan.architecture;
        let output = self.fresh("Layers");
        let mut inputs = [rows, &cache.seqlens_k, prefixes]
            .map(str::to_owned)
            .to_vec();
        let mut outputs = vec![output.clone()];
        for idx in 0..architecture.n_layers {
            let [past_key, past_value, key, value] = self.kept(idx);
            inputs.extend([past_key, past_value]);
            outputs.extend([key, value]);
            inputs.extend(self.layer_constants(idx));
        }
        let attributes = self.layers_attributes(architecture.n_layers);
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        self.push("Layers", IMAGEGPT, &inputs, outputs, attributes);
        output
    }

    /// Adds the first `n_layers` layers of whole images as one operator, from
    /// `(batch, sequence, width)`, and the norm that follows them unless the
    /// output is the raw stream of a layer inside the model.
    pub(super) fn image_layers(
        &mut self,
        input: &str,
        n_layers: usize,
        output: LayersOutput,
    ) -> String {
        let norm = if n_layers == self.plan.architecture.n_layers {
            self.weight("final_norm")
        } else if output == LayersOutput::NormedMeans {
            self.weight(&format!("h.{n_layers}.attention_norm"))
        } else {
            self.nothing()
        };
        let mut inputs = vec![input.to_owned(), norm];
        for idx in 0..n_layers {
            inputs.extend(self.layer_constants(idx));
        }
        let mut attributes = self.layers_attributes(n_layers);
        attributes.push(AttributeProto::string("output", output.name()));
        let value = self.fresh("ImageLayers");
        let outputs = vec![value.clone()];
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        self.push("ImageLayers", IMAGEGPT, &inputs, outputs, attributes);
        value
    }

    /// Returns the constant inputs of a layer within an operator of all layers.
    fn layer_constants(&mut self, idx: usize) -> Vec<String> {
        let name = |part: &str| format!("h.{idx}.{part}");
        let mut constants = vec![self.weight(&name("attention_norm"))];
        constants.extend(self.product(&name("qkv")));
        constants.extend(self.product(&name("projection")));
        constants.push(self.weight(&name("inner_norm")));
        constants.extend(self.product(&name("expand")));
        constants.extend(self.product(&name("contract")));
        constants
    }

    /// Returns the attributes of an operator of the first `n_layers` layers.
    fn layers_attributes(&self, n_layers: usize) -> Vec<AttributeProto> {
        let architecture = self.plan.architecture;
        let scales = (0..n_layers).map(|idx| {
            #[expect(clippy::cast_possible_truncation, reason = "ONNX attributes are f32")]
            let scale = architecture.attention_scale(idx) as f32;
            scale
        });
        vec![
            AttributeProto::int("num_heads", as_i64(architecture.n_heads)),
            AttributeProto::floats("scale", scales.collect()),
            AttributeProto::float("epsilon", architecture.epsilon),
            AttributeProto::string("activation", architecture.activation.name()),
        ]
    }

    /// Returns a product's weights, scales and bias; an empty tensor stands for
    /// missing scales or a missing bias.
    fn product(&mut self, name: &str) -> [String; 3] {
        let [scale, bias] = ["scale", "bias"].map(|part| {
            let name = format!("{name}.{part}");
            if self.plan.store.contains(&name) {
                self.weight(&name)
            } else {
                self.nothing()
            }
        });
        [self.weight(name), scale, bias]
    }
}

/// Converts a size of an
/// [`Architecture`](crate::model::architecture::Architecture), which bounds its
/// sizes.
fn as_i64(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}
