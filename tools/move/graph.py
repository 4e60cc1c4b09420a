import ast,sys,glob,os
root=sys.argv[1]
files=[p for p in glob.glob(root+'/pc_transformer/**/*.py',recursive=True) if '_modidx' not in p]
name=lambda p:os.path.relpath(p,root).removesuffix('.py').replace('/','.').removesuffix('.__init__')
mods={name(p):p for p in files}
edges={}
for m,p in mods.items():
    if p.endswith('__init__.py'): continue
    pkg=m.split('.')[:-1]
    out={}
    for n in ast.walk(ast.parse(open(p).read())):
        if isinstance(n,ast.ImportFrom):
            base=('.'.join(pkg[:len(pkg)-(n.level-1)]+([n.module] if n.module else [])) if n.level else n.module) or ''
            if base.startswith('pc_transformer'):
                for a in n.names:
                    t=base+'.'+a.name if base+'.'+a.name in mods else base
                    out.setdefault(t,[]).append(a.name)
    edges[m]=out
# SCC
idx={};low={};st=[];on=set();res=[]
def dfs(v):
    idx[v]=low[v]=len(idx); st.append(v); on.add(v)
    for w in edges.get(v,{}):
        if w not in edges: continue
        if w not in idx: dfs(w); low[v]=min(low[v],low[w])
        elif w in on: low[v]=min(low[v],idx[w])
    if low[v]==idx[v]:
        c=[]
        while True:
            w=st.pop(); on.discard(w); c.append(w)
            if w==v: break
        if len(c)>1: res.append(c)
sys.setrecursionlimit(9999)
for v in edges:
    if v not in idx: dfs(v)
for c in res:
    print('CYCLE',c)
    for v in c:
        for w,ns in edges[v].items():
            if w in c: print('   ',v,'->',w,ns)
floors=['cli','experiments monitoring interop','training','inference learning','settling','model','attention data','energies config isolation theory']
lev={x:i for i,f in enumerate(floors) for x in f.split()}
for v,out in edges.items():
    a=v.split('.')[1]
    for w,ns in out.items():
        b=w.split('.')[1] if '.' in w else None
        if b and b not in lev: print('STALE',v,'->',w,ns); continue
        if b and lev[b]<=lev[a] and a!=b: print('UP',v,'->',w,ns)
        if b and w.count('.')==1 and a==b and w!=v: print('FACE',v,'->',w,ns)
        if b and os.path.isdir(mods.get(w,'x').replace('__init__.py','')) and a!=b and w in mods and mods[w].endswith('__init__.py') : print('via face',v,'->',w,ns)
