//! The graphs of the tasks: the backbone, and the output of each task.

use super::backbone::{CacheInputs, LayersOutput, ResidualStream, TokenInputs};
use super::builder::Builder;
use super::{Attention, GraphPlan};
use crate::model::graph::{Graph, Norm, PREFIXES};
use crate::model::onnx::{AttributeProto, DataType, Dim, ModelProto, TensorProto, ValueInfoProto};
use crate::model::precision::Provider;

const BATCH: Dim = Dim::Name("batch");
const SEQUENCE: Dim = Dim::Name("sequence");

/// Builds `embed`, with the output `features`: means over positions of every
/// layer from the embedding to the feature layer, `(batch, feature_layer + 1,
/// width)`.
pub(super) fn embed(plan: &GraphPlan<'_>, norm: Norm) -> ModelProto {
    let architecture = plan.architecture;
    let mut builder = Builder::new(plan, Graph::Features(norm).file_stem());
    let tokens = builder.tokens();
    let dims = [
        BATCH,
        Dim::Size(plan.feature_layer + 1),
        Dim::Size(architecture.width),
    ];
    let info = ValueInfoProto::tensor("features", DataType::Float, &dims);
    if plan.attention == Attention::ImageLayers && plan.feature_layer > 0 {
        let output = match norm {
            Norm::PreAttnRms => LayersOutput::NormedMeans,
            Norm::None => LayersOutput::RawMeans,
        };
        let input = builder.embedded(&tokens);
        let features = builder.image_layers(&input, plan.feature_layer, output);
        builder.output(&features, info);
        return builder.finish();
    }
    let mean = builder.mean_row(&tokens);
    let mut stream = builder.stream(&tokens);
    let mut pooled = Vec::new();
    for idx in 0..=plan.feature_layer {
        builder.scope = format!("h.{idx}");
        let is_last = idx == architecture.n_layers;
        // The raw features of the layer that ends the graph need no norm.
        let normed = (norm == Norm::PreAttnRms || idx < plan.feature_layer || is_last)
            .then(|| builder.norm_before(idx, &mut stream));
        let feature = match &normed {
            Some(normed) if norm == Norm::PreAttnRms || is_last => normed.clone(),
            _ => builder.settled(&mut stream),
        };
        pooled.push(builder.pooled(&tokens, &feature, &mean));
        if let Some(normed) = normed.filter(|_| idx < plan.feature_layer) {
            builder.layer(idx, &tokens, &mut stream, &normed, None);
        }
    }
    let inputs: Vec<&str> = pooled.iter().map(String::as_str).collect();
    let features = builder.standard("Concat", &inputs, vec![AttributeProto::int("axis", 1)]);
    builder.output(&features, info);
    builder.finish()
}

/// Builds `hidden`, with the output `last_hidden_state`, `(batch, sequence,
/// width)`.
pub(super) fn hidden(plan: &GraphPlan<'_>) -> ModelProto {
    let width = plan.architecture.width;
    let mut builder = Builder::new(plan, Graph::Hidden.file_stem());
    let tokens = builder.tokens();
    let hidden = if plan.attention == Attention::ImageLayers {
        builder.final_sequences(&tokens)
    } else {
        let rows = builder.final_rows(&tokens);
        let rows = builder.float(&rows);
        builder.sequences(&tokens, &rows, width)
    };
    let dims = [BATCH, SEQUENCE, Dim::Size(width)];
    builder.output(
        &hidden,
        ValueInfoProto::tensor("last_hidden_state", DataType::Float, &dims),
    );
    builder.finish()
}

/// Builds `classify`, with the output `logits`, `(batch, classes)`: a
/// fine-tuned head over the mean.
pub(super) fn classify(plan: &GraphPlan<'_>) -> ModelProto {
    let mut builder = Builder::new(plan, Graph::Logits.file_stem());
    let tokens = builder.tokens();
    let pooled = if plan.attention == Attention::ImageLayers {
        let input = builder.embedded(&tokens);
        let n_layers = plan.architecture.n_layers;
        let means = builder.image_layers(&input, n_layers, LayersOutput::RawMeans);
        let last = builder.int64s("last", &[-1]);
        let axis = vec![AttributeProto::int("axis", 1)];
        builder.standard("Gather", &[&means, &last], axis)
    } else {
        let mean = builder.mean_row(&tokens);
        let rows = builder.final_rows(&tokens);
        builder.pooled(&tokens, &rows, &mean)
    };
    let pooled = builder.rows(&pooled);
    let pooled = builder.activation_type(&pooled);
    let logits = builder.head(&pooled, "classification_head");
    let logits = builder.float(&logits);
    let dims = [BATCH, Dim::Name("classes")];
    builder.output(
        &logits,
        ValueInfoProto::tensor("logits", DataType::Float, &dims),
    );
    builder.finish()
}

/// Builds `score`, with the output `nll`, `(batch, sequence)`: the negative
/// log-likelihood of each of `targets` given the `input_ids` up to its
/// position, in nats. To score an image, `input_ids` are the start token and
/// all tokens but the last, and `targets` are all tokens.
pub(super) fn score(plan: &GraphPlan<'_>) -> ModelProto {
    let mut builder = Builder::new(plan, Graph::Score.file_stem());
    let tokens = builder.tokens();
    let info = ValueInfoProto::tensor("targets", DataType::Int32, &[BATCH, SEQUENCE]);
    let targets = builder.input(info);
    let rows = builder.final_rows(&tokens);
    let logits = builder.head(&rows, "language_head");
    let logits = builder.float(&logits);
    let axis = || vec![AttributeProto::int("axis", 1)];
    let log_likelihoods = builder.standard("LogSoftmax", &[&logits], axis());
    let column = builder.int64s("column", &[-1, 1]);
    let targets = builder.standard("Reshape", &[&targets, &column], Vec::new());
    let picked = builder.standard("GatherElements", &[&log_likelihoods, &targets], axis());
    let nll = builder.standard("Neg", &[&picked], Vec::new());
    let nll = builder.standard("Reshape", &[&nll, &tokens.shape], Vec::new());
    let info = ValueInfoProto::tensor("nll", DataType::Float, &[BATCH, SEQUENCE]);
    builder.output(&nll, info);
    builder.finish()
}

/// Builds `generate`, with the output `logits`, `(batch, colors)`: logits of
/// the token after the last of `input_ids`.
///
/// `position_ids` are the positions of the tokens. `seqlens_k` and
/// `total_sequence_length` follow ONNX Runtime's convention: the number of
/// tokens of each sequence after this step, less one, and the largest number of
/// any sequence. `Layers` has no `total_sequence_length`, but has `prefixes`:
/// for each sequence another sequence, and the number of first positions that
/// both have in common. `past_key.N` and `key.N` should be one buffer of
/// `(batch, heads, capacity, elements)`, and so should `past_value.N` and
/// `value.N`; the capacity is a multiple of
/// [`BLOCK`](crate::kernels::attention::BLOCK). With more than one token per
/// sequence (a primer), all sequences must be at their beginning.
pub(super) fn generate(plan: &GraphPlan<'_>) -> ModelProto {
    let mut builder = Builder::new(plan, Graph::Generate.file_stem());
    let tokens = builder.tokens();
    let int32 = |name, dims: &[Dim]| ValueInfoProto::tensor(name, DataType::Int32, dims);
    let positions = builder.input(int32("position_ids", &[BATCH, SEQUENCE]));
    let cache = CacheInputs {
        seqlens_k: builder.input(int32("seqlens_k", &[BATCH])),
        total_sequence_length: builder.input(int32("total_sequence_length", &[])),
    };
    let table = builder.weight("wpe");
    let positions = builder.standard("Gather", &[&table, &positions], Vec::new());
    let rows = builder.embedded_at(&tokens, &positions);
    let rows = builder.rows(&rows);
    let rows = if plan.attention == Attention::Layers {
        let prefixes = builder.input(int32(PREFIXES, &[BATCH, Dim::Size(2)]));
        builder.all_layers(&rows, &cache, &prefixes)
    } else {
        let mut stream = builder.through_layers(&tokens, rows, Some(&cache));
        builder.settled(&mut stream)
    };
    "out".clone_into(&mut builder.scope);
    let width = plan.architecture.width;
    let sequences = builder.sequences(&tokens, &rows, width);
    let last = builder.int64s("last", &[-1]);
    let axis = vec![AttributeProto::int("axis", 1)];
    let rows = builder.standard("Gather", &[&sequences, &last], axis);
    let rows = builder.rows(&rows);
    let normed = builder.norm(&mut ResidualStream::new(rows), "final_norm");
    let logits = if plan.attention == Attention::Layers {
        builder.head_beside_nothing(&normed, "language_head")
    } else {
        builder.head(&normed, "language_head")
    };
    let logits = builder.float(&logits);
    let dims = [BATCH, Dim::Size(plan.architecture.n_colors())];
    builder.output(
        &logits,
        ValueInfoProto::tensor("logits", DataType::Float, &dims),
    );
    builder.finish()
}

/// Names of the tensors by which means over positions are computed.
struct MeanRow {
    /// Tensor `(1, sequence)`, with which rows are multiplied.
    row: String,
    /// Tensor `(1, 1)`, with which the products are multiplied in f32.
    scale: Option<String>,
}

impl MeanRow {
    fn exact(row: String) -> Self {
        Self { row, scale: None }
    }
}

impl Builder<'_> {
    /// Returns `(batch, sequence, width)` after all layers and the final norm,
    /// from one operator.
    fn final_sequences(&mut self, tokens: &TokenInputs) -> String {
        let input = self.embedded(tokens);
        let n_layers = self.plan.architecture.n_layers;
        self.image_layers(&input, n_layers, LayersOutput::Rows)
    }

    /// Returns the stream before the first layer.
    fn stream(&mut self, tokens: &TokenInputs) -> ResidualStream {
        let embedded = self.embedded(tokens);
        ResidualStream::new(self.rows(&embedded))
    }

    /// Returns the rows after all layers and the final norm.
    fn final_rows(&mut self, tokens: &TokenInputs) -> String {
        if self.plan.attention == Attention::ImageLayers {
            let sequences = self.final_sequences(tokens);
            return self.rows(&sequences);
        }
        let rows = self.embedded(tokens);
        let rows = self.rows(&rows);
        let mut stream = self.through_layers(tokens, rows, None);
        self.norm(&mut stream, "final_norm")
    }

    fn through_layers(
        &mut self,
        tokens: &TokenInputs,
        rows: String,
        cache: Option<&CacheInputs>,
    ) -> ResidualStream {
        let mut stream = ResidualStream::new(rows);
        for idx in 0..self.plan.architecture.n_layers {
            self.scope = format!("h.{idx}");
            let normed = self.norm_before(idx, &mut stream);
            self.layer(idx, tokens, &mut stream, &normed, cache);
        }
        "out".clone_into(&mut self.scope);
        stream
    }

    /// Adds the norm in front of layer `idx`, or the final norm after the last
    /// layer.
    fn norm_before(&mut self, idx: usize, stream: &mut ResidualStream) -> String {
        if idx == self.plan.architecture.n_layers {
            self.norm(stream, "final_norm")
        } else {
            self.norm(stream, &format!("h.{idx}.attention_norm"))
        }
    }

    /// Returns a tensor `(1, sequence)` of `1 / sequence`, whose product with
    /// rows is their mean over positions. `ReduceMean` over the middle axis
    /// takes 1.6 ms per layer and image, the product a few tenths.
    ///
    /// In 16 bits `1 / sequence` is exact only for powers of two, and all means
    /// of a model with another number of positions would be off by up to 0.2 %
    /// in bf16. There the row has a power of two instead, and the means are
    /// scaled in f32.
    fn mean_row(&mut self, tokens: &TokenInputs) -> MeanRow {
        let one = self.int64s("one", &[1]);
        let row = self.ones(&[&one, &tokens.sequence]);
        if self.plan.provider == Provider::Cpu {
            let length = self.float(&tokens.sequence);
            return MeanRow::exact(self.standard("Div", &[&row, &length], Vec::new()));
        }
        // A length from the host would be copied to the GPU in each run, and
        // then runs could not be captured. Counting on the GPU is exact.
        let column = self.ones(&[&tokens.sequence, &one]);
        let length = self.standard("MatMul", &[&row, &column], Vec::new());
        let n_positions = self.plan.architecture.n_positions;
        let is_16_bits = self.plan.activation() != DataType::Float;
        if is_16_bits && !n_positions.is_power_of_two() {
            let power = n_positions.next_power_of_two();
            #[expect(clippy::cast_precision_loss, reason = "a power of two is exact")]
            let [power, part] = [power as f32, 1.0 / power as f32];
            let part = self.float32("mean_part", part);
            let row = self.standard("Mul", &[&row, &part], Vec::new());
            let power = self.float32("mean_power", power);
            let scale = self.standard("Div", &[&power, &length], Vec::new());
            return MeanRow {
                row: self.activation_type(&row),
                scale: Some(scale),
            };
        }
        let mean = self.standard("Div", &[&row, &length], Vec::new());
        MeanRow::exact(self.activation_type(&mean))
    }

    /// Returns a tensor of ones in f32, whose sizes are known when the graph
    /// runs.
    fn ones(&mut self, sizes: &[&str]) -> String {
        let axis = vec![AttributeProto::int("axis", 0)];
        let shape = self.standard("Concat", sizes, axis);
        let value = TensorProto {
            dims: vec![1],
            data_type: DataType::Float.into(),
            raw_data: 1.0_f32.to_le_bytes().to_vec(),
            ..TensorProto::default()
        };
        let value = vec![AttributeProto::tensor("value", value)];
        self.standard("ConstantOfShape", &[&shape], value)
    }

    /// Returns the means over positions, `(batch, 1, width)`, always in f32. A
    /// GPU adds 16-bit numbers in f32 and rounds the mean; to convert them to
    /// f32 first, all of them would have to be written and read once more.
    fn pooled(&mut self, tokens: &TokenInputs, rows: &str, mean: &MeanRow) -> String {
        let width = self.plan.architecture.width;
        let sequences = self.sequences(tokens, rows, width);
        let pooled = self.standard("MatMul", &[&mean.row, &sequences], Vec::new());
        if self.plan.activation() == DataType::Float {
            return pooled;
        }
        let pooled = self.float(&pooled);
        match &mean.scale {
            Some(scale) => self.standard("Mul", &[&pooled, scale], Vec::new()),
            None => pooled,
        }
    }

    /// Computes `x H^T` with a head of the shape `(outputs, width)`.
    fn head(&mut self, rows: &str, name: &str) -> String {
        let head = self.weight(name);
        let attributes = vec![AttributeProto::int("transB", 1)];
        self.standard("Gemm", &[rows, &head], attributes)
    }

    /// Computes `x H^T` with a row of zeros below `x`: ONNX Runtime adds in
    /// another order for a single row than for several, and a token's logits
    /// must not depend on the number of sequences.
    fn head_beside_nothing(&mut self, rows: &str, name: &str) -> String {
        let width = self.plan.architecture.width;
        let zeros = self.zeros("no_row", &[1, width]);
        let axis = || vec![AttributeProto::int("axis", 0)];
        let rows = self.standard("Concat", &[rows, &zeros], axis());
        let logits = self.head(&rows, name);
        let [first, end, rows_axis] = [("first", 0), ("end", -1), ("rows_axis", 0)]
            .map(|(name, at)| self.int64s(name, &[at]));
        self.standard("Slice", &[&logits, &first, &end, &rows_axis], Vec::new())
    }

    /// Converts to f32; ONNX Runtime removes a cast that changes nothing.
    fn float(&mut self, value: &str) -> String {
        let to = vec![AttributeProto::int(
            "to",
            i64::from(i32::from(DataType::Float)),
        )];
        self.standard("Cast", &[value], to)
    }

    fn activation_type(&mut self, value: &str) -> String {
        let to = i32::from(self.plan.activation());
        let to = vec![AttributeProto::int("to", to.into())];
        self.standard("Cast", &[value], to)
    }
}
