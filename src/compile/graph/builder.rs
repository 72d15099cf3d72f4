//! Builder of a graph, which adds nodes one by one and names them by their
//! layer.

use std::collections::BTreeSet;

use super::GraphPlan;
use crate::model::onnx::{
    AttributeProto, DataType, GraphProto, IMAGEGPT, IR_VERSION, MICROSOFT, ModelProto, NodeProto,
    OPSET, OperatorSet, TensorProto, ValueInfoProto,
};

/// Builder of one graph.
pub(super) struct Builder<'p> {
    pub(super) plan: &'p GraphPlan<'p>,
    graph: GraphProto,
    initializers: BTreeSet<String>,
    /// Prefix of the names of new nodes, mostly the layer.
    pub(super) scope: String,
}

impl<'p> Builder<'p> {
    pub(super) fn new(plan: &'p GraphPlan<'p>, name: &str) -> Self {
        Self {
            plan,
            graph: GraphProto {
                name: name.to_owned(),
                ..GraphProto::default()
            },
            initializers: BTreeSet::new(),
            scope: "in".to_owned(),
        }
    }

    pub(super) fn input(&mut self, info: ValueInfoProto) -> String {
        let name = info.name.clone();
        self.graph.input.push(info);
        name
    }

    /// Declares `value` as an output, through a node that gives it the output's
    /// name.
    pub(super) fn output(&mut self, value: &str, info: ValueInfoProto) {
        let name = info.name.clone();
        self.graph.output.push(info);
        self.push("Identity", "", &[value], vec![name], Vec::new());
    }

    /// Declares an output that a node already writes under the output's name.
    pub(super) fn declare_output(&mut self, info: ValueInfoProto) {
        self.graph.output.push(info);
    }

    /// Adds a tensor of `weights.bin`, once, and returns its name.
    pub(super) fn weight(&mut self, name: &str) -> String {
        let tensor = self
            .plan
            .store
            .get(name)
            .expect("weights are written before graphs, and for all of them");
        if self.initializers.insert(name.to_owned()) {
            self.graph.initializer.push(tensor.clone());
        }
        name.to_owned()
    }

    /// Adds a small constant, once, and returns its name; the same name must
    /// always stand for the same value.
    pub(super) fn int64s(&mut self, name: &str, values: &[i64]) -> String {
        if self.initializers.insert(name.to_owned()) {
            self.graph
                .initializer
                .push(TensorProto::int64s(name, values));
        }
        name.to_owned()
    }

    /// Adds a constant of zeros in f32, once, and returns its name.
    pub(super) fn zeros(&mut self, name: &str, dims: &[usize]) -> String {
        if self.initializers.insert(name.to_owned()) {
            let as_i64 = |size: &usize| i64::try_from(*size).unwrap_or(i64::MAX);
            self.graph.initializer.push(TensorProto {
                name: name.to_owned(),
                dims: dims.iter().map(as_i64).collect(),
                data_type: DataType::Float.into(),
                raw_data: vec![0; dims.iter().product::<usize>() * size_of::<f32>()],
                ..TensorProto::default()
            });
        }
        name.to_owned()
    }

    /// Adds a constant in f32, once, and returns its name.
    pub(super) fn float32(&mut self, name: &str, value: f32) -> String {
        if self.initializers.insert(name.to_owned()) {
            self.graph.initializer.push(TensorProto {
                name: name.to_owned(),
                dims: vec![1],
                data_type: DataType::Float.into(),
                raw_data: value.to_le_bytes().to_vec(),
                ..TensorProto::default()
            });
        }
        name.to_owned()
    }

    /// Adds an empty tensor, for a required input of an operator that has no
    /// value.
    pub(super) fn nothing(&mut self) -> String {
        self.zeros("nothing", &[0])
    }

    /// Adds a standard operator with one output, and returns the output's name.
    pub(super) fn standard(
        &mut self,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let output = self.fresh(operator);
        self.push(operator, "", inputs, vec![output.clone()], attributes);
        output
    }

    /// Adds a fused operator of ONNX Runtime with one output, and returns the
    /// output's name.
    pub(super) fn fused(
        &mut self,
        operator: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let output = self.fresh(operator);
        self.push(
            operator,
            MICROSOFT,
            inputs,
            vec![output.clone()],
            attributes,
        );
        output
    }

    pub(super) fn push(
        &mut self,
        operator: &str,
        domain: &str,
        inputs: &[&str],
        outputs: Vec<String>,
        attributes: Vec<AttributeProto>,
    ) {
        let name = format!("{}/{operator}.{}", self.scope, self.graph.node.len());
        self.graph.node.push(NodeProto {
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: outputs,
            name,
            op_type: operator.to_owned(),
            domain: domain.to_owned(),
            attribute: attributes,
        });
    }

    /// Returns a name that no value has yet.
    pub(super) fn fresh(&self, what: &str) -> String {
        format!("{}/{what}:{}", self.scope, self.graph.node.len())
    }

    pub(super) fn finish(self) -> ModelProto {
        let domain = |domain: &str, version| OperatorSet {
            domain: domain.to_owned(),
            version,
        };
        ModelProto {
            ir_version: IR_VERSION,
            opset_import: vec![domain("", OPSET), domain(MICROSOFT, 1), domain(IMAGEGPT, 1)],
            producer_name: env!("CARGO_PKG_NAME").to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            graph: Some(self.graph),
        }
    }
}
