// Validates custom resources (a JSON array on standard input) against the
// schemas of their operators, which Kubernetes' own do not have.
import path from "node:path";
import { pathToFileURL } from "node:url";

// The packages lie in target/deploy-tools, not beside this file.
const models = path.resolve(process.argv[2], "node_modules/@kubernetes-models");
const load = (file) => import(pathToFileURL(path.join(models, file)));
const classes = {
  "monitoring.coreos.com/v1": await load("prometheus-operator/monitoring.coreos.com/v1/index.js"),
  "keda.sh/v1alpha1": await load("keda/keda.sh/v1alpha1/index.js"),
};

let text = "";
for await (const chunk of process.stdin) text += chunk;
let failed = 0;
for (const resource of JSON.parse(text)) {
  const kind = `${resource.apiVersion} ${resource.kind}`;
  try {
    const Model = classes[resource.apiVersion]?.[resource.kind];
    if (!Model) throw new Error("no schema");
    new Model(resource).validate();
  } catch (error) {
    failed += 1;
    console.error(`${kind} ${resource.metadata?.name}: ${error.message}`);
  }
}
process.exit(failed ? 1 : 0);
