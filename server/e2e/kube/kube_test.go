// Package kube uses k8s.io/apiserver's storage as a client of Spindle. Most of the testing is apiserver's own:
// run.sh runs its tests over the server that package testserver starts. Here is only what they leave out.
package kube

import (
	"context"
	"fmt"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"k8s.io/apimachinery/pkg/api/apitesting"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	examplev1 "k8s.io/apiserver/pkg/apis/example/v1"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3"
	"k8s.io/apiserver/pkg/storage/value/encrypt/identity"
	"k8s.io/utils/clock"

	"spindle/server/e2e/kube/testserver"
)

const eventTimeout = time.Minute

// newStore returns the storage of pods over a new server, and etcd's own client of that server.
func newStore(t *testing.T) (storage.Interface, *clientv3.Client) {
	t.Helper()
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.SchemeGroupVersion)
	utilruntime.Must(example.AddToScheme(scheme))
	utilruntime.Must(examplev1.AddToScheme(scheme))
	codec := apitesting.TestCodec(serializer.NewCodecFactory(scheme), examplev1.SchemeGroupVersion)

	client := testserver.RunEtcd(t, nil)
	compactor := etcd3.NewCompactor(client.Client, 0, clock.RealClock{}, nil)
	t.Cleanup(compactor.Stop)
	versioner := storage.APIObjectVersioner{}
	store, err := etcd3.New(client, compactor, codec,
		func() runtime.Object { return &example.Pod{} }, func() runtime.Object { return &example.PodList{} },
		"/registry", "/pods", schema.GroupResource{Resource: "pods"}, identity.NewEncryptCheckTransformer(),
		etcd3.NewDefaultLeaseManagerConfig(), etcd3.NewDefaultDecoder(codec, versioner), versioner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	return store, client.Client
}

func podKey(name string) string { return "/pods/ns/" + name }

func createPod(t *testing.T, s storage.Interface, name string) string {
	t.Helper()
	out := &example.Pod{}
	pod := &example.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}}
	if err := s.Create(context.Background(), podKey(name), pod, out, 0); err != nil {
		t.Fatal(err)
	}
	return out.ResourceVersion
}

func nextEvent(t *testing.T, w watch.Interface) watch.Event {
	t.Helper()
	select {
	case e, ok := <-w.ResultChan():
		if !ok {
			t.Fatal("the watch ended without a word")
		}
		return e
	case <-time.After(eventTimeout):
		t.Fatal("no event")
	}
	return watch.Event{}
}

// A watch from below the compact revision ends as expired, and a list at such a revision fails as expired;
// a watch from it on goes on without a gap. Also through the compactor of apiserver.
func TestWatchBelowCompaction(t *testing.T) {
	ctx := context.Background()
	s, client := newStore(t)
	var rvs []string
	for i := range 6 {
		rvs = append(rvs, createPod(t, s, fmt.Sprintf("pod-%d", i)))
	}
	compacted, err := s.Versioner().ParseResourceVersion(rvs[3])
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := etcd3.Compact(ctx, client, 0, int64(compacted)); err != nil {
		t.Fatal(err)
	}

	opts := func(rv string) storage.ListOptions {
		return storage.ListOptions{ResourceVersion: rv, Predicate: storage.Everything, Recursive: true}
	}
	w, err := s.Watch(ctx, "/pods/", opts(rvs[0]))
	if err != nil {
		t.Fatal(err)
	}
	e := nextEvent(t, w)
	if status, ok := e.Object.(*metav1.Status); e.Type != watch.Error || !ok || status.Reason != metav1.StatusReasonExpired {
		t.Errorf("watch from below the compact revision: %s %#v", e.Type, e.Object)
	}
	w.Stop()

	exact := opts(rvs[0])
	exact.ResourceVersionMatch = metav1.ResourceVersionMatchExact
	if err := s.GetList(ctx, "/pods/", exact, &example.PodList{}); !apierrors.IsResourceExpired(err) {
		t.Errorf("list at a compacted revision: %v", err)
	}
	exact.ResourceVersion = rvs[4]
	list := &example.PodList{}
	if err := s.GetList(ctx, "/pods/", exact, list); err != nil || len(list.Items) != 5 || list.ResourceVersion != rvs[4] {
		t.Errorf("list at %s: %v, %d pods at %s", rvs[4], err, len(list.Items), list.ResourceVersion)
	}

	w, err = s.Watch(ctx, "/pods/", opts(rvs[3]))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	for i := 4; i < 6; i++ {
		e := nextEvent(t, w)
		pod, ok := e.Object.(*example.Pod)
		if e.Type != watch.Added || !ok || pod.ResourceVersion != rvs[i] || pod.Name != fmt.Sprintf("pod-%d", i) {
			t.Errorf("event %d: %s %#v, expected pod-%d at %s", i, e.Type, e.Object, i, rvs[i])
		}
	}
}

// Objects with a TTL, which nobody keeps alive: events in numbers, which share leases and lie on all members, vanish, each
// once, in order, with their last state; a master lease lives as long as it is written anew in time, on a new lease each time.
func TestTTL(t *testing.T) {
	ctx := context.Background()
	s, client := newStore(t)
	const events, ttl = 40, 5 // in which all of them are created
	created := map[string]string{}
	for i := range events {
		name, out := fmt.Sprintf("event-%02d", i), &example.Pod{}
		pod := &example.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, Labels: map[string]string{"n": name}}}
		if err := s.Create(ctx, podKey(name), pod, out, ttl); err != nil {
			t.Fatal(err)
		}
		created[name] = out.ResourceVersion
	}
	first := createPod(t, s, "stays")
	w, err := s.Watch(ctx, "/pods/ns/", storage.ListOptions{ResourceVersion: first, Predicate: storage.Everything, Recursive: true})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()

	master := func(n int) {
		t.Helper()
		lives := uint64(15) // as of kube-apiserver itself
		err := s.GuaranteedUpdate(ctx, "/pods/masters/10.0.0.1", &example.Pod{}, true, nil,
			func(in runtime.Object, _ storage.ResponseMeta) (runtime.Object, *uint64, error) {
				pod := in.(*example.Pod)
				pod.Namespace, pod.Name, pod.Generation = "masters", "10.0.0.1", int64(n)
				return pod, &lives, nil
			}, nil)
		if err != nil {
			t.Fatal(err)
		}
	}
	master(0)
	there := func(name string) bool {
		r, err := client.Get(ctx, "/registry/pods/masters/10.0.0.1")
		if err != nil {
			t.Fatal(name, err)
		}
		return len(r.Kvs) == 1
	}
	last, deleted := uint64(0), map[string]bool{}
	for n := 1; len(deleted) < events; n++ {
		e := nextEvent(t, w)
		pod, ok := e.Object.(*example.Pod)
		if !ok || e.Type != watch.Deleted || deleted[pod.Name] || created[pod.Name] == "" || pod.Labels["n"] != pod.Name {
			t.Fatalf("%s %#v", e.Type, e.Object)
		}
		rev, err := s.Versioner().ObjectResourceVersion(pod)
		if err != nil || rev < last {
			t.Fatalf("%s was deleted at %d, behind %d: %v", pod.Name, rev, last, err)
		}
		last, deleted[pod.Name] = rev, true
		if n == 1 || n == events/2 {
			master(n) // the lease before loses its key, and takes nothing with it
		}
	}
	list := &example.PodList{}
	if err := s.GetList(ctx, "/pods/ns/", storage.ListOptions{Predicate: storage.Everything, Recursive: true}, list); err != nil || len(list.Items) != 1 {
		t.Errorf("%v, %d objects are left", err, len(list.Items))
	}
	if !there("after the events") {
		t.Error("the master lease went with an old lease")
	}
	deadline := time.Now().Add(eventTimeout)
	for there("in the end") {
		if time.Now().After(deadline) {
			t.Fatal("the master lease does not end")
		}
		<-time.After(50 * time.Millisecond)
	}
	leases, err := client.Leases(ctx)
	if err != nil || len(leases.Leases) > 1 {
		t.Errorf("leases are left: %v, %v", leases, err)
	}
}
