"""Text for the bundled base model: English about commands, small chats, stories and exercises, all made by this grammar.

Every command family below is a template followed by ways to say what it does and by questions that it answers (marked
with `?`). `[a|b]` chooses one wording and `{slot}` draws a name or number. The grammar describes and explains commands; it
holds no chat whose answer is a command line, so that answering an instruction with exactly one command is left for
fine-tuning to teach.
"""

import random
import re
from collections.abc import Callable, Iterator

Message = dict[str, str]
Document = str | list[Message]
Family = tuple[str, list[str]]


def words(text: str) -> list[str]:
    return text.split()


FAMILIES = """
kubectl get pods{in_ns}
  list [|all ]the pods
  [show|display|print] every pod [that is running|there is]
  see which pods [are running|exist]
  ? [which|what] pods [are running|exist|do I have|are up]
kubectl get pods -A
  list [|all ]the pods [in|across|from] [all|every one of the] namespaces
  show every pod [in|of] the whole cluster
kubectl get pods -o wide{in_ns}
  list the pods [with|together with|along with] their [nodes|node names and addresses|IP addresses]
  show [on which node|where] each pod runs
  ? [on which machines do|where do] the pods run
kubectl get pods -l {key}={val}{in_ns}
  list [only |]the pods [labelled|with the label|that carry the label] {key}={val}
  [select|find] the pods [whose {key} label is|where the label {key} equals] {val}
  ? which pods [have|carry] the label {key}={val}
kubectl get pods --watch{in_ns}
  watch the pods [change|as they change]
  keep [following|printing] the pods as their status changes
kubectl get pods --show-labels{in_ns}
  list the pods [with|together with|and] their labels
  show [the labels of every pod|which labels each pod has]
kubectl get pods --sort-by=.metadata.creationTimestamp{in_ns}
  list the pods [sorted by age|ordered by creation time|by when they were created]
  sort the pods by [creation time|age]
kubectl get pods --field-selector=status.phase={phase}{in_ns}
  list [only |]the pods [that are |]in the {phase} [phase|state]
  list the pods whose phase is {phase}
  [find|show] the pods that are {phase}
  ? which [of the |]pods are {phase}
kubectl get pod {pod} -o yaml{in_ns}
  [print|show|dump|get] [the pod {pod}|pod {pod}] as YAML
  print the [full |]YAML [definition|manifest] of [the pod |pod |]{pod}
kubectl get {kinds}{in_ns}
  list [|all ]the {kinds}
  [show|display] every {kind}
  see [which {kinds} there are|what {kinds} exist]
  ? [which|what] {kinds} [are there|exist|do we have]
kubectl get {kind} {app} -o yaml{in_ns}
  [print|show|dump] [the {kind} {app}|the {app} {kind}] as YAML
  print the YAML [definition|manifest] of the {app} {kind}
kubectl get {kinds} -A
  list the {kinds} [in|across|of] all namespaces
  show every {kind} in the [whole |]cluster
kubectl get {kinds} -o name{in_ns}
  print only the names of the {kinds}
kubectl get nodes
  list the [nodes|machines] of the cluster
  [show|see] every node [in the cluster|and whether it is ready]
  ? [which|what] nodes does the cluster have
kubectl get nodes -o wide
  list the nodes with [their IP addresses|addresses and versions|more detail]
kubectl get namespaces
  list [|all ]the namespaces
  show [which namespaces exist|every namespace of the cluster]
kubectl get events --sort-by=.lastTimestamp{in_ns}
  list the [|latest |recent ]events [in order of time|sorted by time|oldest first]
  show [what happened lately|the events by time]
  ? what [has happened|went on] lately
kubectl get all{in_ns}
  list [the main resources|pods, services and deployments together|the usual objects]
kubectl describe pod {pod}{in_ns}
  describe [the pod|pod] {pod}
  show the [details|events and status|full state] of [the pod|pod] {pod}
  [explain|find out] why [the pod|pod] {pod} [is stuck|does not start|is pending]
  ? [why is|what is wrong with|what happened to] [the pod|pod] {pod}
  ? why does [the pod|pod] {pod} not [start|run|become ready]
kubectl describe node {node}
  describe [the node|node] {node}
  show the [details|conditions|capacity] of [the node|node] {node}
  ? [what is the state of|how is] [the node|node] {node}
kubectl describe {kind} {app}{in_ns}
  describe [the {kind} {app}|the {app} {kind}]
  show the [details|events] of [the {kind} {app}|the {app} {kind}]
kubectl logs {pod}{in_ns}
  print the logs of [the pod|pod|] {pod}
  [show|read|see] what [the pod|pod|] {pod} [wrote|has logged]
  ? what [did|has] [the pod|pod] {pod} [log|logged|written]
kubectl logs -f {pod}{in_ns}
  [follow|stream|tail] the logs of [the pod|pod|] {pod}
  keep printing the log [output |]of [the pod|pod|] {pod} [as it grows|live]
kubectl logs {pod} --tail={n}{in_ns}
  [print|show] the last {n} [lines of the log|log lines] of [the pod|pod|] {pod}
  read [only |]the {n} [newest|latest|most recent] log lines [of|from] [the pod|pod|] {pod}
  ? what are the last {n} log lines of [the pod|pod] {pod}
kubectl logs {pod} --previous{in_ns}
  print the logs of the [previous|crashed|last] [container|instance|run] of [the pod|pod|] {pod}
  show what [the pod|pod|] {pod} logged before [it crashed|its restart]
  ? what did [the pod|pod] {pod} log before [the crash|it restarted]
kubectl logs {pod} -c {app}{in_ns}
  print the logs of [the container {app}|the {app} container] [in|of|inside] [the pod|pod] {pod}
kubectl logs {pod} --since={n}{unit}{in_ns}
  [print|show] the logs of [the pod|pod|] {pod} [from|of|for|written in] the last {n} {units}
  ? what [did|has] [the pod|pod] {pod} [log|logged] in the [last|past] {n} {units}
kubectl logs deployment/{app}{in_ns}
  print the logs of [the deployment {app}|the {app} deployment]
kubectl logs -l {key}={val}{in_ns}
  print the logs of [all|every one of the] pods [labelled|with the label] {key}={val}
kubectl scale {wkind} {app} --replicas={n}{in_ns}
  scale [the {wkind} {app}|the {app} {wkind}|{wkind} {app}] to {n} [replicas|pods]
  [set|change] the [number of replicas|replica count] of [the {wkind} {app}|the {app} {wkind}] to {n}
  run {n} [replicas|pods|instances] of [the {wkind} {app}|the {app} {wkind}]
kubectl autoscale deployment {app} --min={n} --max={m} --cpu-percent={percent}{in_ns}
  autoscale [the deployment {app}|the {app} deployment] between {n} and {m} [pods|replicas] at {percent} percent CPU
kubectl rollout status {wkind}/{app}{in_ns}
  [watch|check|follow] the rollout of [the {wkind} {app}|the {app} {wkind}]
  wait until the rollout of [the {wkind} {app}|the {app} {wkind}] [is done|has finished]
  ? [is|has] the rollout of [the {wkind} {app}|the {app} {wkind}] [done|finished|complete]
kubectl rollout restart {wkind}/{app}{in_ns}
  restart [the {wkind} {app}|the {app} {wkind}]
  restart [all pods|the pods] of [the {wkind} {app}|the {app} {wkind}] [one by one|with a rolling restart]
kubectl rollout undo {wkind}/{app}{in_ns}
  [undo|revert] the [last|latest] rollout of [the {wkind} {app}|the {app} {wkind}]
  roll [the {wkind} {app}|the {app} {wkind}] back to [the previous|its previous|the earlier] [version|revision]
kubectl rollout undo deployment/{app} --to-revision={n}{in_ns}
  roll [the deployment {app}|the {app} deployment] back to revision {n}
  return [the deployment {app}|the {app} deployment] to revision {n}
kubectl rollout history {wkind}/{app}{in_ns}
  [list|show] the [past rollouts|revisions|rollout history] of [the {wkind} {app}|the {app} {wkind}]
  ? which [revisions|rollouts] [does|did] [the {wkind} {app}|the {app} {wkind}] have
kubectl rollout pause deployment/{app}{in_ns}
  pause the rollout of [the deployment {app}|the {app} deployment]
kubectl rollout resume deployment/{app}{in_ns}
  resume the [paused |]rollout of [the deployment {app}|the {app} deployment]
kubectl set image deployment/{app} {app2}={image}{in_ns}
  [set|change|update] the image of [the container {app2}|the {app2} container] in [the deployment {app}|the {app} deployment] to {image}
kubectl set env deployment/{app} {env}={val}{in_ns}
  set the [environment |]variable {env} to {val} [in|on|for] [the deployment {app}|the {app} deployment]
kubectl apply -f {yaml}{in_ns}
  apply [the manifest|the file|] {yaml}
  create or update [what is described in|the objects in|the resources from] {yaml}
kubectl apply -k {dir}
  apply the kustomization in [the directory|the folder|] {dir}
kubectl apply -f {yaml} --dry-run=server
  [check|test|try] [the manifest|the file|] {yaml} on the server without [changing anything|applying it]
kubectl diff -f {yaml}
  [show|preview] what [would change|applying {yaml} would change] [|]in the cluster from {yaml}
  compare {yaml} with the [live objects|cluster]
  ? what would {yaml} change
kubectl delete -f {yaml}{in_ns}
  delete [the resources|everything|the objects] [defined|described] in {yaml}
kubectl delete pod {pod}{in_ns}
  [delete|remove|kill] [the pod|pod] {pod}
kubectl delete pod {pod} --grace-period=0 --force{in_ns}
  forcibly delete [the pod|pod] {pod}
  delete [the pod|pod] {pod} [by force|by force and at once|immediately|without waiting]
kubectl delete {kind} {app}{in_ns}
  [delete|remove] [the {kind} {app}|the {app} {kind}]
kubectl delete pods -l {key}={val}{in_ns}
  [delete|remove] [all|every one of the] pods [labelled|with the label] {key}={val}
kubectl delete namespace {ns}
  [delete|remove] [the namespace {ns}|the {ns} namespace]
kubectl create namespace {ns}
  [create|make|add] [the namespace {ns}|a namespace called {ns}|a new namespace named {ns}]
kubectl create deployment {app} --image={image}{in_ns}
  create a deployment [called|named] {app} [from|with|running|that uses] the image {image}
kubectl create configmap {app} --from-file={file}{in_ns}
  create a configmap [called|named] {app} from the file {file}
kubectl create configmap {app} --from-literal={key}={val}{in_ns}
  create a configmap [called|named] {app} [holding|with|where] {key}={val}
kubectl create secret generic {app} --from-literal={key}={val}{in_ns}
  create a secret [called|named] {app} [holding|with|where] {key}={val}
kubectl create job {app} --image={image}{in_ns}
  create a job [called|named] {app} [from|with|that runs] the image {image}
kubectl run {app} --image={image}{in_ns}
  [start|run] a pod [called|named] {app} [from|with] the image {image}
kubectl expose deployment {app} --port={port}{in_ns}
  expose [the deployment {app}|the {app} deployment] [on|at] port {port}
  create a service for [the deployment {app}|the {app} deployment] on port {port}
kubectl exec -it {pod}{in_ns} -- sh
  open a shell [in|inside] [the pod|pod|] {pod}
  [start|get] an interactive shell [in|inside] [the pod|pod|] {pod}
kubectl exec {pod}{in_ns} -- env
  print the environment [variables |]of [the pod|pod|] {pod}
  ? which variables are set in [the pod|pod] {pod}
kubectl exec {pod}{in_ns} -- ls {dir}
  list the [files in|contents of] {dir} [inside|in] [the pod|pod|] {pod}
  ? which files are in {dir} of [the pod|pod] {pod}
kubectl exec {pod}{in_ns} -- cat {path}
  [print|show|read] the file {path} [inside|in|from] [the pod|pod|] {pod}
kubectl port-forward pod/{pod} {port}:{port2}{in_ns}
  forward [local port|port] {port} to port {port2} of [the pod|pod] {pod}
kubectl port-forward service/{app} {port}:{port2}{in_ns}
  forward [local port|port] {port} to port {port2} of [the service {app}|the {app} service]
kubectl cp {pod}:{path} {file}{in_ns}
  copy [the file |]{path} [from|out of] [the pod|pod|] {pod} to [the local file |]{file}
kubectl cp {file} {pod}:{path}{in_ns}
  copy [the local file|the file|] {file} [into|to] [the pod|pod|] {pod} [as|at] {path}
kubectl top pods{in_ns}
  show the CPU and memory [use|usage] of the pods
  see how much [CPU and memory|memory] the pods use
  ? how much [CPU and memory|memory and CPU] do [the|all] pods [take|need]
kubectl top nodes
  show the CPU and memory [use|usage] of the nodes
  see how [busy|loaded] the nodes are
  ? how [loaded|full] are the nodes
kubectl top pods --sort-by={res}{in_ns}
  [sort|rank|order] the pods by {res} [use|usage|consumption]
  show which pods use the most {res}
  ? which pods [need|take] the most {res}
kubectl label pod {pod} {key}={val}{in_ns}
  label [the pod|pod] {pod} with {key}={val}
  [add|attach|give] the label {key}={val} to [the pod|pod] {pod}
kubectl label node {node} {key}={val}
  label [the node|node] {node} with {key}={val}
  [add|attach|give] the label {key}={val} to [the node|node] {node}
kubectl label pod {pod} {key}-{in_ns}
  remove the [label {key}|{key} label] from [the pod|pod] {pod}
kubectl label node {node} {key}-
  [remove|take] the [label {key}|{key} label] from [the node|node] {node}
kubectl annotate {kind} {app} {key}={val}{in_ns}
  annotate [the {kind} {app}|the {app} {kind}] with {key}={val}
  add the annotation {key}={val} to [the {kind} {app}|the {app} {kind}]
kubectl taint nodes {node} {key}={val}:NoSchedule
  taint [the node|node] {node} with {key}={val} [so that|to keep] new pods [stay away|away]
kubectl cordon {node}
  cordon [the node|node|] {node}
  [mark|set] [the node|node] {node} [as unschedulable|unschedulable]
  keep new pods [off|away from] [the node|node] {node}
kubectl uncordon {node}
  uncordon [the node|node|] {node}
  [mark|make] [the node|node] {node} schedulable again
  let [the node|node] {node} [accept|take] [new |]pods again
kubectl drain {node} --ignore-daemonsets
  drain [the node|node|] {node} [but leave daemonsets alone|ignoring daemonsets|apart from daemonsets]
  [evict|move] [all|the] pods [from|off] [the node|node] {node} before maintenance
kubectl config get-contexts
  list the [available |]contexts [|in the kubeconfig]
  ? which contexts [do I have|are there]
kubectl config current-context
  [print|show] the [current|active] context
  see which context is [current|in use]
  ? [which|what] is the [current|active] context
kubectl config use-context {ctx}
  [switch|change] to the [context {ctx}|{ctx} context]
  [select|activate] the [context {ctx}|{ctx} context]
kubectl config set-context --current --namespace={ns}
  [make|set] {ns} the default namespace of the current context
  set the [default namespace|namespace of the current context] to {ns}
kubectl config view
  [print|show] the kubeconfig [settings|]
kubectl cluster-info
  [print|show] the addresses of the control plane
  show [basic |]information about the cluster
kubectl version
  print the [client and server versions|versions of kubectl and the server]
kubectl api-resources
  list the [kinds of resources|resource types|API resources] [the cluster knows|of the server]
kubectl explain {wkind}.spec
  explain the [fields|parts] of a {wkind} spec
kubectl auth can-i {verb} {kinds}{in_ns}
  check whether [you|the current user] may {verb} {kinds}
  ? [may|can] I {verb} {kinds}
kubectl wait --for=condition=Ready pod/{pod}{in_ns}
  wait until [the pod|pod] {pod} is ready
kubectl wait --for=condition=Ready pod/{pod} --timeout={n}s{in_ns}
  wait [up to|at most] {n} seconds for [the pod|pod] {pod} to become ready
kubectl edit {kind} {app}{in_ns}
  [edit|open] [the {kind} {app}|the {app} {kind}] in [an|the] editor
ls -la {dir}
  list all files in {dir} [with details|including hidden ones]
  show [hidden files|everything] in [the directory |]{dir} [with|along with] [sizes and dates|permissions]
ls -lt {dir}
  list the files in {dir} [newest first|by time|sorted by modification time]
  ? which files in {dir} are the newest
ls -lS {dir}
  list the files in {dir} [largest first|by size|sorted by size]
  ? which files in {dir} are the [largest|biggest]
ls {dir}
  list the [files in|contents of] [the directory |]{dir}
  ? [which files are|what is] in [the folder|the directory|] {dir}
pwd
  print the [current|working] directory
  ? [where|in which folder] am I
cd {dir}
  [change|go|move] to the directory {dir}
mkdir -p {dir}
  [create|make] the directory {dir} [with its parents|and any missing parents]
touch {file}
  create [an empty file called|the empty file] {file}
cp {file} {file2}
  copy [the file |]{file} to {file2}
cp -r {dir} {dir2}
  copy the [directory|folder] {dir} [to|into] {dir2} [|recursively]
mv {file} {file2}
  rename [the file |]{file} to {file2}
mv {file} {dir}
  move [the file |]{file} [to|into] [the directory |]{dir}
rm {file}
  [delete|remove] [the file |]{file}
rm -r {dir}
  [delete|remove] the [directory|folder] {dir} [and everything in it|with its contents]
rmdir {dir}
  remove the empty [directory|folder] {dir}
ln -s {path} {file}
  [create|make] a [symbolic link|symlink] [called|named] {file} [to|pointing to|that points to] {path}
cat {file}
  [print|show] [the file |the contents of ]{file}
head -n {n} {file}
  [print|show] the first {n} lines of {file}
  ? what are the first {n} lines of {file}
tail -n {n} {file}
  [print|show] the last {n} lines of {file}
  ? what [are|stands in] the last {n} lines of {file}
tail -f {log}
  follow [the log |the file |]{log} [as it grows|live]
  keep printing new lines of {log}
less {file}
  [page|scroll] through {file}
file {file}
  [tell|find out] what [type|kind] of file {file} is
  ? what [type|sort] of file is {file}
stat {file}
  show the [size, times and permissions|metadata|status] of {file}
  ? when was {file} [changed|modified]
wc -l {file}
  count the lines [in|of] {file}
  ? how many lines [are in|has] {file}
wc -w {file}
  count the words [in|of] {file}
  ? how many words [are in|has] {file}
diff {file} {file2}
  [compare|show the differences between] {file} and {file2}
  ? how do {file} and {file2} differ
  ? what is [the difference|different] between {file} and {file2}
sha256sum {file}
  compute the [SHA-256 checksum|SHA-256 hash] of {file}
find {dir} -name '*.{ext}'
  find [all|the|every one of the] {ext} files [in|under|below] {dir}
  search {dir} for [files ending in .{ext}|.{ext} files]
  ? where [in|under] {dir} are the [.{ext}|{ext}] files
find {dir} -type d -name '{word}'
  find [directories|folders] [called|named] {word} [in|under] {dir}
find {dir} -type f -size +{size}
  find [the |]files [larger|bigger] than {size} [in|under] {dir}
  ? which files [in|under] {dir} are [larger|bigger] than {size}
find {dir} -type f -mtime -{n}
  find [the |]files [changed|modified] in the last {n} days [in|under] {dir}
  ? which files [in|under] {dir} [were|have been] [changed|modified] in the last {n} days
find {dir} -type f -mtime +{n} -delete
  delete [the |]files older than {n} days [in|under|from] {dir}
find {dir} -type f -empty
  find [the |]empty files [in|under] {dir}
  ? which files in {dir} are empty
grep '{word}' {file}
  [print|show|find] the lines [of|in] {file} [that contain|containing|with] {word}
  search [the file |]{file} for [the word |]{word}
  ? [which|what] lines of {file} [contain|have] {word}
grep -i '{word}' {file}
  search {file} for {word} [ignoring case|without regard to case|in upper or lower case]
grep -r '{word}' {dir}
  search [all|the] files [in|under] {dir} for {word}
  look for {word} [recursively |]in [every file|all files] [in|under] {dir}
  ? where [in|under] {dir} [is|stands] {word}
grep -v '{word}' {file}
  [print|show] the lines of {file} [without|that do not contain] {word}
grep -c '{word}' {file}
  count the lines [in|of] {file} [that contain|containing|with] {word}
  ? how many lines of {file} [contain|have] {word}
grep -n '{word}' {file}
  [print|show] the lines of {file} [that contain|with] {word} [and|together with|with] their line numbers
  ? on which lines of {file} is {word}
grep -rl '{word}' {dir}
  list the [names of the |]files [in|under] {dir} that contain {word}
  ? which files [in|under] {dir} contain {word}
sed -i 's/{word}/{word2}/g' {file}
  replace {word} [with|by] {word2} in {file}
  [change|turn] every {word} into {word2} in {file}
sed 's/{word}/{word2}/' {file}
  print {file} with the first {word} on each line replaced by {word2}
sed -n '{n},{m}p' {file}
  [print|show] lines {n} to {m} of {file}
sed -i '/{word}/d' {file}
  [delete|remove] [every line|the lines] [containing|with] {word} from {file}
awk '{print ${d}}' {file}
  print [column|field] {d} of {file}
  [print|show] the {ord} [column|field] of {file}
awk -F, '{print ${d}}' {csv}
  [print|show] [column {d}|the {ord} column] of [the CSV file|the comma separated file] {csv}
awk '{sum += ${d}} END {print sum}' {file}
  [add up|sum] [column {d}|the {ord} column] of {file}
  ? what is the [sum|total] of column {d} of {file}
cut -d, -f{d} {csv}
  cut [column {d}|the {ord} column|field {d}] out of [the CSV file |]{csv}
cut -d: -f{d} {path}
  cut [field {d}|the {ord} field] out of {path} [at the colons|split at colons]
sort {file}
  sort the lines of {file} [|alphabetically]
sort -n {file}
  sort [the lines of |]{file} [numerically|by number]
sort -r {file}
  sort {file} in reverse order
sort -u {file}
  sort {file} [and drop duplicates|without duplicates|keeping each line once]
sort {file} | uniq -c
  count how often each line [appears|occurs] in {file}
  ? how often [is|does] each line [found|occur] in {file}
sort -k{d} {file}
  sort {file} by [column {d}|the {ord} column]
tr 'a-z' 'A-Z' < {file}
  [turn|convert] the text of {file} to upper case
tr -d '\\r' < {file}
  [remove|strip] carriage returns from {file}
ps aux
  list [all|the] [running |]processes
  ? [which|what] processes are running
ps aux | grep {app}
  find the processes [matching|called|of] {app}
pgrep {app}
  [print|find] the process [ids|numbers] of {app}
  ? what is the process id of {app}
kill {pid}
  [stop|end|terminate] [the process|process] {pid}
kill -9 {pid}
  [kill|stop] [the process|process] {pid} [at once|by force|forcibly]
pkill {app}
  [kill|stop|end] [all|the] processes [called|named] {app}
top
  [watch|show] the busiest processes live
nohup ./{script} &
  run {script} in the background [even after logout|so that it survives logout]
free -h
  show [the free memory|how much memory is free|memory use in readable units]
  ? how much [free |]memory is there
uptime
  show how long the [machine|system] has been [up|running]
  ? [how|since] long has the system been up
nproc
  print the number of [CPU cores|processors]
df -h
  show the [free|used|available] disk space [of all file systems|in readable units]
  ? how much [disk space is free|space is left on the disks]
df -h {dir}
  show the [free|available] disk space [on the file system of|for] {dir}
  ? how much [disk space|space] is left for {dir}
du -sh {dir}
  show [the total size of|how much space is used by] {dir}
  [tell|find out] how [big|large] {dir} is
  ? how [big|large] is {dir}
  ? how much [disk space|space] does {dir} [use|need]
du -h --max-depth=1 {dir}
  show the size of each [directory|folder] [directly |]in {dir}
  ? how big is each directory in {dir}
du -sh {dir}/* | sort -h
  sort [the entries of|what is in] {dir} by size
lsblk
  list the [disks|block devices]
mount
  list the mounted file systems
ping -c {n} {host}
  ping [the host |]{host} {n} times
  send {n} pings to {host}
  ? does {host} answer [|to] {n} pings
curl -I {url}
  [fetch|show|get] [only |]the headers of {url}
curl -o {file} {url}
  download {url} [to|into|as|and save it as] {file}
curl -s {url}
  fetch {url} [quietly|silently|without progress output]
wget {url}
  download {url}
ssh {user}@{host}
  [log in to|connect to|open a session on] {host} as [the user |]{user}
ssh -p {port} {user}@{host}
  [log in to|connect to] {host} as {user} [on|over|through] port {port}
scp {file} {user}@{host}:{dir}
  copy [the file |]{file} to {dir} on {host} as [the user |]{user}
rsync -av {dir} {user}@{host}:{dir2}
  [sync|synchronise] {dir} to {dir2} on {host} as [the user |]{user}
dig {host}
  look up [the address of |]{host} in the DNS
  ? what is the address of {host}
ss -tlnp
  list the [listening ports|TCP ports that are listening|open TCP ports]
  ? which ports are [open|listening]
lsof -i :{port}
  find [out |]which process [uses|listens on] port {port}
  ? [what|which program] [uses|listens on|is using] port {port}
ip addr
  show the [IP addresses|network addresses] of [this machine|all interfaces]
nc -zv {host} {port}
  [check|test] whether port {port} [on|of] {host} is open
  ? is port {port} [on|of] {host} open
hostname
  print the name of this machine
  ? what is this machine called
tar -czf {arc}.tar.gz {dir}
  [pack|archive|compress] [the directory |]{dir} [into|as] {arc}.tar.gz
  create [the archive |]{arc}.tar.gz [from|of] {dir}
tar -xzf {arc}.tar.gz
  [extract|unpack] [the archive |]{arc}.tar.gz
tar -xzf {arc}.tar.gz -C {dir}
  [extract|unpack] {arc}.tar.gz [into|to] [the directory |]{dir}
tar -tzf {arc}.tar.gz
  list the [contents of|files in] [the archive |]{arc}.tar.gz
  ? what is in {arc}.tar.gz
zip -r {arc}.zip {dir}
  [zip|pack] [the directory |]{dir} into {arc}.zip
unzip {arc}.zip
  [unzip|unpack|extract] {arc}.zip
unzip {arc}.zip -d {dir}
  [unzip|unpack|extract] {arc}.zip into {dir}
gzip {file}
  compress {file} with gzip
gunzip {file}.gz
  decompress {file}.gz
chmod +x {script}
  make {script} executable
  [allow|let] {script} to be run
chmod {mode} {file}
  set the [permissions|mode] of {file} to {mode}
chmod -R {mode} {dir}
  set the [permissions|mode] of {dir} and everything in it to {mode}
chown {user} {file}
  make {user} the owner of {file}
  [change|give] the ownership of {file} to {user}
chown {user}:{group} {file}
  give {file} to the user {user} and the group {group}
chown -R {user} {dir}
  make {user} the owner of {dir} and everything in it
chgrp {group} {file}
  change the group of {file} to {group}
sudo useradd -m {user}
  [create|add] a user [called|named] {user} with a home directory
sudo usermod -aG {group} {user}
  add [the user |]{user} to the group {group}
id {user}
  show the [groups|user and group ids] of {user}
  ? which groups is {user} in
whoami
  print the [name of the current user|current user name]
  ? who am I
who
  list the users who are logged in
  ? who is logged in
sudo systemctl start {app}
  start the [service {app}|{app} service]
sudo systemctl stop {app}
  stop the [service {app}|{app} service]
sudo systemctl restart {app}
  restart the [service {app}|{app} service]
sudo systemctl enable {app}
  [start|enable] the [service {app}|{app} service] at boot
systemctl status {app}
  [show|check] the status of the [service {app}|{app} service]
  ? [is|how is] the [service {app}|{app} service] [running|doing]
journalctl -u {app} -f
  follow the [journal|log] of the {app} service
journalctl -u {app} --since today
  [show|print] today's [journal|log] [entries |]of the {app} service
  ? what did the {app} service log today
crontab -l
  list the [cron jobs|scheduled jobs] of the current user
crontab -e
  edit the [cron jobs|scheduled jobs] of the current user
echo ${env}
  print the [value of the |][environment |]variable {env}
  ? what is the value of {env}
export {env}={val}
  set the environment variable {env} to {val}
env
  list [all|the] environment variables
which {app}
  find out where [the program|the command] {app} is
  ? where is [the program|the command] {app}
date
  print the [current |]date and time
  ? what time is it now
date +%F
  print [today's date|the date] as year, month and day
history | tail -n {n}
  [show|print] the last {n} commands [typed|from the history]
git status
  show which files [have changed|are modified] in the [repository|working tree]
  ? what have I changed
git clone {url}
  clone the repository [at|from] {url}
git switch -c {branch}
  create the branch {branch} and switch to it
git switch {branch}
  switch to the branch {branch}
git log --oneline -n {n}
  show the last {n} commits on one line each
  ? what are the last {n} commits
git diff {branch}
  compare the working tree with the branch {branch}
git branch -d {branch}
  delete the [branch {branch}|{branch} branch]
git add {file}
  stage [the file |]{file}
git stash
  put the [local |uncommitted |]changes away for later
"""

GLOSSARY = """
pod: the smallest thing Kubernetes runs, one or more containers that share an address
deployment: an object that keeps a wanted number of identical pods running and replaces them step by step
namespace: a named part of a cluster that keeps the objects of one team or project apart
node: a machine of the cluster on which pods are placed
service: a stable name and address in front of a changing set of pods
configmap: a bag of settings that pods can read as files or variables
secret: a small object for passwords and keys that should not stand in a manifest
replica: one of several identical copies of a pod
rollout: the step by step replacement of old pods by new ones
label: a short key and value attached to an object so that it can be selected
context: a cluster, a user and a namespace that are chosen together
manifest: a YAML file which says what objects should exist
daemonset: an object that runs one pod on every node
statefulset: an object for pods that need stable names and their own disks
job: an object that runs a pod until its work is done
cronjob: an object that starts a job at given times
ingress: a set of rules that leads web traffic to services
container: a process with its own files, started from an image
image: a packed file system from which containers are started
file: a named row of bytes on a disk
directory: a list of names that lead to files and other directories
pipe: a connection that hands the output of one program to the next
process: a program that is running, known by its number
signal: a short message to a process, such as a request to stop
port: a number that tells programs on one address apart
host: a machine that can be reached over the network
archive: one file that holds many files
checksum: a short number computed from a file to see whether it has changed
permission: a rule which says who may read, write or run a file
owner: the user to whom a file belongs
group: a set of users who share permissions
shell: the program that reads command lines and starts other programs
variable: a name that stands for a value
branch: a line of commits with a name
commit: a saved state of a repository with a message
regular expression: a pattern that describes a set of strings
log: a file to which a program writes what it does
disk: a device that keeps data when the power is off
cache: a store of results that are needed again soon
"""

PROGRAMS = """
kubectl: talk to a Kubernetes cluster
ls: list directory contents
cp: copy files
mv: move or rename files
rm: remove files
find: search for files in a directory tree
grep: print lines that match a pattern
sed: edit a stream of lines
awk: work on the columns of text
sort: put lines in order
uniq: drop or count repeated lines
cut: take columns out of lines
tr: replace or delete characters
head: print the beginning of a file
tail: print the end of a file
wc: count lines, words and bytes
tar: pack and unpack archives
gzip: compress files
zip: pack files into a zip archive
chmod: change the permissions of files
chown: change the owner of files
ps: list processes
kill: send a signal to a process
df: report free disk space
du: report how much space files take
ping: test whether a host answers
curl: transfer data from a URL
ssh: log in to another machine
scp: copy files between machines
rsync: synchronise directories
systemctl: control services
journalctl: read the journal of services
git: keep the history of a project
ln: make links between files
mkdir: create directories
touch: create files or update their times
diff: compare files line by line
"""

NOUNS = words("""web api shop cart auth login search mail queue cache proxy gateway billing invoice payment order stock report audit
metrics monitor alert backup archive image video photo audio player stream feed news blog wiki docs forum chat room board game
score map route ride trip hotel flight ticket booking event calendar clock timer weather sensor meter light door garden kitchen
recipe menu coffee bread apple lemon cherry banana melon pepper sugar river lake ocean island forest mountain valley desert bridge
tower castle harbor station train tram truck rocket planet comet moon sun star cloud storm rain snow wind fire stone iron copper
silver gold amber ruby pearl crystal falcon eagle raven robin tiger lion bear wolf fox otter badger rabbit turtle dolphin whale
data store index ledger bank loan tax salary staff team user profile account session token key vault guard shield scanner parser
worker runner builder loader writer reader sender printer painter teacher student school library book letter note draft page
frontend backend portal console dashboard catalog inventory shipping tracker survey poll vote rating review comment support sales
market price quote budget target model train batch sample config setup install update release""")
PEOPLE = words("ana ben carla david emma felix greta hugo iris jonas kim lena marco nina oscar paula rosa sam tara vera victor wanda")
TEXT_EXTENSIONS = words("txt log csv json yaml py sh md conf html xml sql tmp bak list")
EXTENSIONS = [*TEXT_EXTENSIONS, *words("jpg png pdf zip mp4 gz")]
NUMBER_WORDS = words("zero one two three four five six seven eight nine ten eleven twelve")
ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth")
UNITS = {"m": "minutes", "h": "hours", "s": "seconds"}
CHOICES: dict[str, list[str]] = {
    "kind": words("service deployment configmap secret ingress job cronjob statefulset daemonset"),
    "wkind": words("deployment deployment deployment statefulset"),
    "phase": words("Pending Running Failed Succeeded"),
    "res": ["cpu", "memory"],
    "key": words("app tier env team role version zone disk owner stage track type"),
    "verb": words("create delete get list update watch"),
    "mode": words("600 640 644 664 700 750 755 775 400 444"),
    "group": words("staff admin docker wheel users developers www-data ops editors sudo"),
    "ext": EXTENSIONS,
    "percent": words("50 60 70 75 80 90"),
    "env": words("HOME PATH LANG EDITOR MODE DEBUG LOG_LEVEL REGION API_KEY TIMEOUT PORT COLOR"),
    "branch": words("main dev feature release hotfix"),
}
# What a text keeps talking about: the next command of a page is often about the same pod or file as the one before.
SHARED_SLOTS = words("ns app pod node file dir word host user arc log csv")
DOUBLED = {"set", "run", "get", "stop", "put", "cut", "tag", "let", "zip", "unzip", "scan", "log", "grep", "drop", "strip", "sum"}


def pseudo_word(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def name(rng: random.Random) -> str:
    def part() -> str:
        return pseudo_word(rng) if rng.random() < 0.15 else rng.choice(NOUNS)

    return f"{part()}-{part()}" if rng.random() < 0.3 else part()


def directory(rng: random.Random) -> str:
    roots = ["/var/log", "/var/lib", "/etc", "/home", "/tmp", "/opt", "/srv", "/usr/share", "/data", "/mnt", "~", "."]
    if rng.random() < 0.3:
        return rng.choice([*roots, "~/projects", "src", "build", "docs", "photos", "downloads", "backups", "tests", "scripts"])
    return name(rng) if rng.random() < 0.4 else f"{rng.choice(roots)}/{name(rng)}"


def filename(rng: random.Random) -> str:
    return f"{name(rng)}.{rng.choice(TEXT_EXTENSIONS)}"


def host(rng: random.Random) -> str:
    if rng.random() < 0.25:
        return ".".join(["10" if rng.random() < 0.5 else "192.168", *(str(rng.randint(0, 255)) for _ in range(2))]) + ".7"
    return name(rng) + rng.choice([".example.com", ".example.org", ".local", "", ""])


def pod_name(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return f"{name(rng)}-" + "".join(rng.choices("bcdfghjklmnpqrstvwxz2456789", k=rng.choice([4, 5])))
    return name(rng) + (f"-{rng.randint(0, 9)}" if rng.random() < 0.5 else "")


def count(rng: random.Random) -> str:
    return str(rng.randint(1, 12) if rng.random() < 0.6 else rng.choice([15, 20, 25, 30, 40, 45, 50, 60, 75, 90, 100, 150, 200, 500, 1000]))


SLOTS: dict[str, Callable[[random.Random], str]] = {
    "app": name,
    "ns": lambda rng: name(rng) if rng.random() < 0.7 else rng.choice(words("default staging prod production dev test kube-system qa")),
    "pod": pod_name,
    "node": lambda rng: f"{rng.choice(['node', 'worker', 'node', 'worker', name(rng)])}-{rng.randint(0, 30)}",
    "ctx": name,
    "val": name,
    "image": lambda rng: f"{name(rng)}:{rng.choice(['latest', f'{rng.randint(0, 9)}.{rng.randint(0, 30)}', f'v{rng.randint(1, 9)}'])}",
    "yaml": lambda rng: f"{name(rng)}.yaml",
    "csv": lambda rng: f"{name(rng)}.csv",
    "script": lambda rng: f"{name(rng)}.sh",
    "log": lambda rng: rng.choice(["", "/var/log/"]) + f"{name(rng)}.log",
    "file": filename,
    "dir": directory,
    "path": lambda rng: f"{rng.choice(['/etc', '/var/log', '/tmp', '/app', '/data', '/opt'])}/{filename(rng)}",
    "word": lambda rng: rng.choice([rng.choice(NOUNS), rng.choice(words("error warning failed timeout ERROR WARN refused debug info"))]),
    "host": host,
    "user": lambda rng: rng.choice([*PEOPLE, "admin", "root", "deploy", pseudo_word(rng)]),
    "port": lambda rng: str(
        rng.choice([22, 53, 80, 443, 2222, 3000, 3306, 5000, 5432, 6379, 8000, 8080, 8443, 9000, rng.randint(1024, 9999)])
    ),
    "n": count,
    "d": lambda rng: str(rng.randint(1, 9)),
    "size": lambda rng: f"{rng.choice([1, 2, 5, 10, 20, 50, 100, 200, 500])}{rng.choice('MG')}",
    "arc": name,
    "url": lambda rng: f"https://{name(rng)}.example.{rng.choice(['com', 'org'])}/{rng.choice([name(rng), filename(rng)])}",
    "pid": lambda rng: str(rng.randint(100, 32000)),
    "unit": lambda rng: rng.choice("mhs"),
}


def parse_families(text: str) -> list[Family]:
    families: list[Family] = []
    for line in text.strip().splitlines():
        if line.startswith("  "):
            families[-1][1].append(line.strip())
        else:
            families.append((line.replace("\\\\", "\\"), []))
    return families


def parse_pairs(text: str) -> list[tuple[str, str]]:
    return [(key, value) for key, value in (line.split(": ", 1) for line in text.strip().splitlines())]


def choose_wording(template: str, rng: random.Random) -> str:
    text = re.sub(r"\[([^\]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    return re.sub(" +", " ", text).strip()


def inflect(phrase: str, ending: str) -> str:
    """'copy the file' becomes 'copies the file' (ending s) or 'copying the file' (ending ing)."""
    verb, _, rest = phrase.partition(" ")
    if verb == "forcibly":
        return f"forcibly {inflect(rest, ending)}"
    if ending == "s":
        if verb.endswith("y") and verb[-2] not in "aeo":
            verb = verb[:-1] + "ies"
        else:
            verb += "es" if verb.endswith(("sh", "ch", "ss", "o", "x")) else "s"
    elif verb in DOUBLED:
        verb += verb[-1] + "ing"
    else:
        verb = (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"
    return f"{verb} {rest}".strip()


class Command:
    """One command line with every slot filled, and as many wordings of its meaning as are asked for."""

    def __init__(self, family: Family, rng: random.Random, known: dict[str, str] | None = None) -> None:
        self.rng, self.template = rng, family[0]
        self.wordings = [wording for wording in family[1] if wording[0] != "?"]
        self.questions = [wording[2:] for wording in family[1] if wording[0] == "?"]
        self.values = {slot: value for slot, value in (known or {}).items() if slot in SHARED_SLOTS and f"{{{slot}}}" in self.template}
        self.inside = self.template if rng.random() < 0.4 else self.template.replace("{in_ns}", "")
        self.line = re.sub(r"\{(\w+)\}", lambda match: self.value(match[1]), self.inside)

    def value(self, slot: str) -> str:
        if slot not in self.values:
            stem = slot.rstrip("0123456789")
            if slot == "in_ns":
                self.values[slot] = f" -n {self.value('ns')}"
            elif slot == "units":
                self.values[slot] = UNITS[self.value("unit")]
            elif slot == "kinds":
                kind = self.value("kind")
                self.values[slot] = kind + ("es" if kind.endswith("s") else "s")
            elif slot == "m":
                self.values[slot] = str(int(self.value("n")) + self.rng.randint(1, 20))
            elif slot == "ord":
                self.values[slot] = ORDINALS[int(self.value("d")) - 1]
            elif stem in CHOICES:
                self.values[slot] = self.rng.choice(CHOICES[stem])
            else:
                self.values[slot] = SLOTS[stem](self.rng)
        return self.values[slot]

    def meaning(self) -> str:
        """A verb phrase in the base form, such as 'list the pods in the shop namespace'."""
        return self.worded(self.wordings)

    def question(self) -> str | None:
        """A question such as 'Which pods are running in the shop namespace?', where the command answers one."""
        return sentence(self.worded(self.questions))[:-1] + "?" if self.questions else None

    def worded(self, wordings: list[str]) -> str:
        rng = self.rng
        text = choose_wording(rng.choice(wordings), rng)
        if "{in_ns}" in self.inside:
            text += rng.choice([" in the {ns} namespace", " in namespace {ns}", " in the namespace {ns}", " in {ns}"])
        spelled = rng.random() < 0.3
        quoted = rng.random() < 0.1

        def fill(match: re.Match[str]) -> str:
            value = self.value(match[1])
            if spelled and match[1] == "n" and int(value) < len(NUMBER_WORDS):
                return NUMBER_WORDS[int(value)]
            return f'"{value}"' if quoted and match[1] in ("app", "pod", "word", "ns", "file") else value

        text = re.sub(r"\{(\w+)\}", fill, text)
        return re.sub(r"\b(1|one) (line|time|ping|minute|hour|second|day|replica|pod|instance|command|commit)s\b", r"\1 \2", text)

    @property
    def program(self) -> str:
        return self.line.removeprefix("sudo ").split()[0]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


class Corpus:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.families = parse_families(FAMILIES)
        self.glossary, self.programs = parse_pairs(GLOSSARY), parse_pairs(PROGRAMS)
        self.by_program: dict[str, list[Family]] = {}
        for family in self.families:
            self.by_program.setdefault(" ".join(family[0].removeprefix("sudo ").split()[:2]), []).append(family)

    def command(self) -> Command:
        return Command(self.rng.choice(self.families), self.rng)

    def commands(self, families: list[Family]) -> Iterator[Command]:
        known: dict[str, str] = {}
        for family in families:
            command = Command(family, self.rng, known if self.rng.random() < 0.7 else None)
            known |= command.values
            yield command

    def some_commands(self, least: int, most: int) -> Iterator[Command]:
        return self.commands(self.rng.choices(self.families, k=self.rng.randint(least, most)))

    def description(self, command: Command) -> str:
        """One or two sentences that name a command and say what it does."""
        rng, line, what = self.rng, f"`{command.line}`", command.meaning()
        person = rng.choice(PEOPLE).capitalize()
        if rng.random() < 0.3 and (question := command.question()):
            return rng.choice([
                f"{question} The answer is given by {line}.", f"{question} {line} tells you.", f'"{question}" {person} typed {line}.',
                f'{person} asked: "{question}" Then somebody ran {line}.', f"{question} To find out, run {line}.",
            ])  # fmt: skip
        return rng.choice(
            [
                f"The command {line} {inflect(what, 's')}.",
                f"{line} {inflect(what, 's')}.",
                f"Use {line} to {what}.",
                f"To {what}, use {line}.",
                f"To {what}, type {line}.",
                f"If you want to {what}, the command is {line}.",
                f"When you need to {what}, {line} is the way to go.",
                f"{sentence(inflect(what, 'ing'))[:-1]} is done with {line}.",
                f"{person} wanted to {what} and typed {line}.",
                f"{person} had to {what}. The answer was {line}.",
                f"{person} ran {line} in order to {what}.",
                f"You can {what}: {line}",
                f"One way to {what} is {line}.",
                f"There is a command that {inflect(what, 's')}: {line}",
            ]
        )

    def prose(self) -> str:
        return " ".join(self.description(command) for command in self.some_commands(1, 4))

    def related(self) -> str:
        """Neighbouring commands side by side, where one flag makes the difference."""
        families = self.rng.choice([group for group in self.by_program.values() if len(group) > 1])
        chosen = self.rng.sample(families, min(len(families), self.rng.randint(2, 4)))
        return "\n".join(self.description(command) for command in self.commands(chosen))

    def cookbook(self) -> str:
        lines = [f"# {self.rng.choice(['Recipes', 'Notes', 'Cheat sheet', 'Handbook', 'Daily work', 'Commands'])}"]
        style = self.rng.randrange(4)
        for command in self.some_commands(2, 6):
            what = command.meaning()
            lines.append(
                [
                    f"{sentence(what)[:-1]}:\n    {command.line}",
                    f"# {what}\n{command.line}",
                    f"{sentence(inflect(what, 'ing'))[:-1]}:\n$ {command.line}",
                    f"- {command.line}  # {inflect(what, 's')}",
                ][style]
            )
        return "\n".join(lines)

    def paraphrase(self) -> str:
        """Two wordings of one command, so that different surfaces meet in one meaning."""
        command = self.command()
        first = command.meaning()
        second = next((other for other in (command.meaning() for _ in range(8)) if other != first), first)
        return self.rng.choice(
            [
                f"To {first} means to {second}. Either way the line is `{command.line}`.",
                f"{sentence(first)} {sentence(second)} Both are done by `{command.line}`.",
                f"`{command.line}`: {first}; {second}.",
                f'Somebody asks: "{self.request(command, first)}" The answer is `{command.line}`.',
                f'"{self.request(command, first)}" "Type {command.line}, which will {second}."',
            ]
        )

    def request(self, command: Command, what: str) -> str:
        """A wish in the words of a person who has it."""
        if self.rng.random() < 0.4 and (question := command.question()):
            return question
        return self.rng.choice([
            f"How do I {what}?", f"How can I {what}?", f"I want to {what}.", f"I need to {what}.", f"Please {what}.", f"Could you {what}?",
            f"I would like to {what}.", f"What is the way to {what}?", sentence(what), f"Can you {what}, please?", f"Let's {what}.",
            f"We have to {what}.", f"Is it possible to {what}?", f"Show me how to {what}.",
        ])  # fmt: skip

    def manual(self) -> str:
        program, purpose = self.rng.choice(self.programs)
        families = [family for key, group in self.by_program.items() if key.split()[0] == program for family in group]
        lines = ["NAME", f"    {program} - {purpose}", "EXAMPLES"]
        for command in self.commands(self.rng.sample(families, min(len(families), 3))):
            lines += [f"    {command.line}", f"        {sentence(command.meaning())}"]
        return "\n".join(lines)

    def definition(self) -> str:
        rng = self.rng
        if rng.random() < 0.4:
            program, purpose = rng.choice(self.programs)
            return rng.choice([f"{program} is a program to {purpose}.", f"The program {program} is there to {purpose}."])
        term, meaning = rng.choice(self.glossary)
        article = "An" if term[0] in "aeiou" else "A"
        return rng.choice([f"{article} {term} is {meaning}.", f"{term.capitalize()}: {meaning}.", f"What is a {term}? It is {meaning}."])

    def story(self) -> str:
        rng = self.rng
        person, friend = (who.capitalize() for who in rng.sample(PEOPLE, 2))
        thing, other, place = rng.sample(NOUNS, 3)
        openings = [
            f"{person} works on the {thing} team with {friend}.",
            f"On {rng.choice(words('Monday Tuesday Wednesday Thursday Friday'))} morning {person} came to work early.",
            f"It was late, and the {thing} service was slow.",
            f"{person} and {friend} look after the {thing} cluster.",
            f"{friend} asked {person} for help with the {thing} server.",
        ]
        middles = [
            f"{friend} said that the {other} was {rng.choice(['full', 'slow', 'empty', 'ready', 'broken', 'new'])}.",
            f"The {other} needed {rng.choice(['more memory', 'a restart', 'a new name', 'more space', 'some care'])}.",
            f"They looked at the {other} for {count(rng)} minutes.",
            f"Nobody knew why the {other} had stopped.",
            f"{person} wrote a note about the {place} and went on.",
        ]
        endings = ["After that everything worked again.", f"{friend} was happy.", "Then they drank a cup of tea.", "The work was done."]
        steps = [self.description(command) for command in self.some_commands(0, 2)]
        return " ".join([rng.choice(openings), *rng.sample(middles, rng.randint(1, 2)), *steps, rng.choice(endings)])

    def session(self) -> str:
        """Lines typed one after another at a prompt."""
        return "\n".join(f"$ {command.line}" for command in self.some_commands(2, 6))

    def chat(self) -> list[Message]:
        turns = [
            self.rng.choice(
                [self.ask_meaning] * 4 + [self.ask_part, self.ask_choice, self.ask_rewording, self.ask_term, self.ask_exercise]
            )()
        ]
        if self.rng.random() < 0.2:
            turns.append(self.rng.choice([self.ask_meaning, self.ask_term, self.ask_exercise])())
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        if self.rng.random() < 0.15:
            system = self.rng.choice(
                ["You are a helpful assistant.", "You explain commands.", "Answer briefly.", "You are a patient teacher."]
            )
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def ask_meaning(self) -> tuple[str, str]:
        command = self.command()
        what = command.meaning()
        question = self.rng.choice([
            "What does `{}` do?", "Explain `{}`.", "Explain this command: {}", "What happens when I type {}?", "Describe the command `{}`.",
            "In plain words, what is {} for?", "{}", "I found `{}` in a script. What is it?",
        ]).format(command.line)  # fmt: skip
        answer = self.rng.choice(
            [f"It {inflect(what, 's')}.", f"This command {inflect(what, 's')}.", f"You use it to {what}.", sentence(what)]
        )
        return question, answer

    def ask_part(self) -> tuple[str, str]:
        command = self.command()
        if command.values and self.rng.random() < 0.7:
            slot = self.rng.choice([slot for slot in command.values if slot not in ("in_ns", "units", "ord", "kinds")])
            label = {"ns": "namespace", "n": "number", "app": "name", "dir": "directory", "val": "value"}.get(slot, slot.rstrip("2"))
            return f"Which {label} stands in `{command.line}`?", command.values[slot]
        return f"Which program does `{command.line}` run?", command.program

    def ask_choice(self) -> tuple[str, str]:
        right, wrong = self.command(), self.command()
        pair = [right, wrong] if self.rng.random() < 0.5 else [wrong, right]
        answer = "The first one." if pair[0] is right else "The second one."
        return f"Which of these would {right.meaning()}?\n1. {pair[0].line}\n2. {pair[1].line}", answer

    def ask_rewording(self) -> tuple[str, str]:
        command = self.command()
        wish = self.request(command, command.meaning())
        if self.rng.random() < 0.5:
            return f"{wish} Which program is this about?", command.program
        return f"Say it in other words: {wish}", sentence(command.meaning())

    def ask_term(self) -> tuple[str, str]:
        term, meaning = self.rng.choice(self.glossary)
        question = self.rng.choice(["What is a {}?", "What does the word {} mean?", "Define {}.", "Tell me about the {}."]).format(term)
        return question, f"A {term} is {meaning}."

    def ask_exercise(self) -> tuple[str, str]:
        rng = self.rng
        left, right = rng.randint(0, 20), rng.randint(0, 20)
        words = [name(rng) for _ in range(rng.randint(2, 5))]
        text = self.command().meaning()
        return rng.choice([
            (f"What is {left} plus {right}?", f"{left} plus {right} is {left + right}."),
            (f"What is {left + right} minus {right}?", f"{left + right} minus {right} is {left}."),
            (f"Sort these words: {', '.join(words)}", ", ".join(sorted(words))),
            (f"Reverse this list: {', '.join(words)}", ", ".join(reversed(words))),
            (f"How many words are in this list? {', '.join(words)}", NUMBER_WORDS[len(words)].capitalize() + "."),
            (f"Repeat after me: {sentence(text)}", sentence(text)),
            (f"Write in capital letters: {words[0]}", words[0].upper()),
            (f"Spell {words[0]}.", " ".join(words[0])),
            (f"Join these words with slashes: {', '.join(words)}", "/".join(words)),
            (f"What comes after {left}?", f"{left + 1}."),
        ])  # fmt: skip

    def documents(self) -> Iterator[Document]:
        kinds: list[tuple[Callable[[], Document], int]] = [
            (self.prose, 22), (self.related, 10), (self.cookbook, 16), (self.paraphrase, 12), (self.manual, 5), (self.definition, 3),
            (self.story, 7), (self.session, 3), (self.chat, 22),
        ]  # fmt: skip
        makers, weights = zip(*kinds, strict=True)
        while True:
            yield self.rng.choices(makers, weights)[0]()
